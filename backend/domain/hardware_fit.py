"""The batch that fits the memory at hand: how many rows a pass, how many passes a step."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from domain.memory_estimate import estimate
from domain.memory_verdict import judge
from domain.model_shape import ModelShape
from domain.peft_config import PeftConfig

# The parameters that it may choose.
FITTED = ("batch_size", "gradient_accumulation", "gradient_checkpointing")


def fit_to_memory(
    shape: ModelShape, config: PeftConfig, available_bytes: int, kept: Collection[str], *, on_gpu: bool
) -> Mapping[str, Any]:
    """Return the changes that make a configuration fit: fewer rows a pass with more passes, then checkpointing.

    The effective batch stays what it was. What the client set itself is left alone, and so is everything that
    changes what is learned.

    Args:
        shape: The model.
        config: The configuration as it would be with memory in plenty.
        available_bytes: What is free on the device.
        kept: Parameters that must not change.
        on_gpu: Whether the device is a CUDA GPU.

    Returns:
        Parameter → value, empty where nothing has to change; if nothing fits, what needs least.
    """
    needs: list[tuple[int, Mapping[str, Any]]] = []
    tight: Mapping[str, Any] | None = None
    for changes in _options(config, kept):
        found = estimate(shape, config.model_copy(update=dict(changes)), on_gpu=on_gpu)
        verdict = judge(found, available_bytes)
        if verdict == "fits":
            return changes
        if verdict == "tight" and tight is None:
            tight = changes
        needs.append((found.total_bytes, changes))
    return tight if tight is not None else min(needs, key=lambda item: item[0])[1]


def _options(config: PeftConfig, kept: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the changes from none to all; recomputing activations costs a quarter of the speed, so it comes last."""
    batches = list(_batches(config)) if not {"batch_size", "gradient_accumulation"} & set(kept) else [{}]
    yield from batches
    if not config.gradient_checkpointing and "gradient_checkpointing" not in kept:
        for batch in batches:
            yield {**batch, "gradient_checkpointing": True}


def _batches(config: PeftConfig) -> Iterator[Mapping[str, int]]:
    yield {}
    rows = config.batch_size
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        yield {
            "batch_size": rows,
            "gradient_accumulation": config.gradient_accumulation * (config.batch_size // rows),
        }
