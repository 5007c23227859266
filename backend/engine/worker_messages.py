"""What an engine and the gradient workers of its run say to each other, over a pair of sockets.

The messages are pickled: both ends are this program, and nobody else can open the sockets.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domain.peft.config import PeftConfig
from domain.protocol import ErrorClass
from engine.batches import Batch

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
        parameters_file: Descriptor of the memory that holds the parameters.
        gradients_file: Descriptor of the memory that this worker writes its gradients to.
    """

    adapter_id: str
    config: PeftConfig
    base_model_id: str
    base_revision: str | None
    initial: bytes | None
    parameters_file: int
    gradients_file: int


@dataclass(frozen=True)
class Prepared:
    """The worker has the adapter, with parameters of these names and shapes in this order."""

    parameters: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pass:
    """One micro-batch: its place in the step, the seed of its random numbers, and its tensors as arrays."""

    index: int
    seed: int
    arrays: dict[str, np.ndarray[Any, Any] | None]
    rows: list[int]
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class Differentiate:
    """Compute the gradient of some passes at the parameters that are in the shared memory now."""

    passes: list[Pass]
    count: int
    scale: float


@dataclass(frozen=True)
class Evaluate:
    """Compute the losses of some passes without a gradient, at the parameters in the shared memory."""

    passes: list[Pass]


@dataclass(frozen=True)
class Computed:
    """The loss of each pass by its place, and the names of the parameters that have a gradient."""

    losses: dict[int, float]
    gradients: list[str]


@dataclass(frozen=True)
class WorkerFailed:
    """The worker could not do it; why, in the terms of a failed command."""

    error_class: ErrorClass
    message: str
    suggestions: list[str]


Order = Hold | Prepare | Differentiate | Evaluate
Answer = Held | Prepared | Computed | WorkerFailed
_TENSORS = ("input_ids", "labels", "attention_mask", "position_ids")


def as_pass(index: int, seed: int, batch: Batch) -> Pass:
    """Write a micro-batch as a message."""
    arrays = {name: None if (value := getattr(batch, name)) is None else value.numpy() for name in _TENSORS}
    return Pass(index, seed, arrays, batch.rows, batch.tokens, batch.trained_tokens)


def as_batch(one: Pass) -> Batch:
    """Read a micro-batch from a message."""
    tensors = {name: None if array is None else torch.from_numpy(array) for name, array in one.arrays.items()}
    return Batch(**tensors, rows=one.rows, tokens=one.tokens, trained_tokens=one.trained_tokens)
