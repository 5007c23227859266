"""What an engine and the gradient workers of its run say to each other, over a pair of sockets.

The messages are pickled: both ends are this program, and nobody else can open the sockets.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domain.peft.config import PeftConfig
from domain.protocol import ErrorClass
from engine.batches import Batch
from engine.objectives import Figures, Size

# Environment variable with the descriptor of the worker's end.
SOCKET_VARIABLE = "PEFT_STUDIO_WORKER_SOCKET"


@dataclass(frozen=True)
class Hold:
    """Load the base.

    Attributes:
        path: Its folder.
        config: The configuration that the engine's own base was loaded with.
        device: What the worker's libraries call its device.
        engine: The back end.
        threads: CPU threads of its passes; None for the library's choice.
    """

    path: Path
    config: PeftConfig
    device: str
    engine: str
    threads: int | None


@dataclass(frozen=True)
class Held:
    """The base is loaded."""


@dataclass(frozen=True)
class Prepare:
    """Make the adapter.

    Attributes:
        config: Of the run.
        initial: A and B as initialised, as the bytes of a safetensors file; None where the adapter starts on the
            base's own weights.
        continues: The folder of the adapter that the run continues; None where it continues none.
        parameters_file: Descriptor of the memory that holds the parameters.
        gradients_file: Descriptor of the memory that this worker writes its gradients to.
    """

    adapter_id: str
    config: PeftConfig
    base_model_id: str
    base_revision: str | None
    initial: bytes | None
    continues: Path | None
    parameters_file: int
    gradients_file: int


@dataclass(frozen=True)
class Prepared:
    """The worker has the adapter, with parameters of these names and shapes in this order."""

    parameters: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlainBatch:
    """A batch with arrays in the place of its tensors."""

    fields: dict[str, Any]
    mismatched: "PlainBatch | None"


@dataclass(frozen=True)
class Pass:
    """One micro-batch, its place in the step, and the seed of its random numbers."""

    index: int
    seed: int
    batch: "PlainBatch"


@dataclass(frozen=True)
class Differentiate:
    """Compute the gradient of some passes at the parameters that are in the shared memory now."""

    passes: list[Pass]
    size: Size
    scale: float


@dataclass(frozen=True)
class Evaluate:
    """Compute the losses of some passes without a gradient, at the parameters in the shared memory."""

    passes: list[Pass]
    size: Size


@dataclass(frozen=True)
class Computed:
    """The figures of each pass by its place, and the names of the parameters that have a gradient."""

    figures: dict[int, Figures]
    gradients: list[str]


@dataclass(frozen=True)
class WorkerFailed:
    """The worker could not do it; why, in the terms of a failed command."""

    error_class: ErrorClass
    message: str
    suggestions: list[str]


Order = Hold | Prepare | Differentiate | Evaluate
Answer = Held | Prepared | Computed | WorkerFailed


def as_pass(index: int, seed: int, batch: Batch) -> Pass:
    """Write a micro-batch as a message."""
    return Pass(index, seed, _plain(batch))


def as_batch(one: Pass) -> Batch:
    """Read a micro-batch from a message."""
    return _whole(one.batch)


def _plain(batch: Batch) -> PlainBatch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "mismatched"}
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return PlainBatch(arrays, _plain(batch.mismatched) if batch.mismatched is not None else None)


def _whole(plain: PlainBatch) -> Batch:
    values = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in plain.fields.items()
    }
    return Batch(**values, mismatched=_whole(plain.mismatched) if plain.mismatched is not None else None)
