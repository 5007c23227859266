"""Fits a configuration to the memory: rows a pass, passes a step, recomputation, and on a CPU the precision."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from domain.memory.estimate import estimate
from domain.memory.unsloth import UnslothHere
from domain.memory.verdict import judge
from domain.models.shape import ModelShape
from domain.peft.config import PeftConfig

# The parameters that it may choose.
FITTED = ("batch_size", "gradient_accumulation", "gradient_checkpointing", "precision")
_BATCH = frozenset({"batch_size", "gradient_accumulation"})


def fit_to_memory(
    shape: ModelShape,
    config: PeftConfig,
    available_bytes: int,
    kept: Collection[str],
    *,
    on_gpu: bool,
    unsloth: UnslothHere | None = None,
) -> Mapping[str, Any]:
    """Return the changes that make a configuration fit the device, and on a GPU use it.

    The fastest way that fits is chosen. The first way is all rows of a step in one pass. Then come fewer rows with more
    passes, then activations that are computed twice. On a CPU, bf16 weights instead of fp32 come last. The effective
    batch does not change. Nothing changes that the client set, and nothing else that affects what is learned.

    Args:
        shape: The model.
        config: The configuration as it would be if nothing were known of the memory.
        available_bytes: What is free on the device.
        kept: Parameters that must not change.
        on_gpu: Whether the device is a CUDA GPU.
        unsloth: Unsloth, where the device has it.

    Returns:
        Parameter → value. It is empty if nothing has to change. If nothing fits, it is the way that needs least.
    """
    needs: list[tuple[int, Mapping[str, Any]]] = []
    tight: Mapping[str, Any] | None = None
    for changes in _options(config, kept, on_gpu=on_gpu):
        if tight is not None and changes["precision"] != config.precision:
            break  # if fp32 may fit, bf16 is not worth it: it is several times slower
        changed = config.model_copy(update=dict(changes))
        needed = estimate(shape, changed, on_gpu=on_gpu, unsloth=unsloth, available_bytes=available_bytes)
        verdict = judge(needed, available_bytes, unsloth)
        if verdict == "fits":
            return _changed(config, changes)
        if verdict == "tight" and tight is None:
            tight = changes
        needs.append((needed.total_bytes, changes))
    return _changed(config, tight if tight is not None else min(needs, key=lambda item: item[0])[1])


def _changed(config: PeftConfig, values: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in values.items() if value != getattr(config, name)}


def _options(config: PeftConfig, kept: Collection[str], *, on_gpu: bool) -> Iterator[Mapping[str, Any]]:
    """Yield all ways from the fastest to the leanest.

    Recomputing activations costs a quarter of the speed, so it comes after smaller batches; a CPU without matrix units
    for bf16 is several times slower in it, so that comes last.
    """
    # KTO's loss depends on which answers are in a pass together.
    fixed = config.objective == "kto"
    batches = [{}] if fixed or _BATCH & set(kept) else list(_batches(config, on_gpu=on_gpu))
    recomputes = [config.gradient_checkpointing]
    if "gradient_checkpointing" not in kept:
        recomputes = [False, True]
    precisions = [config.precision]
    if not on_gpu and "precision" not in kept and config.precision == "fp32":
        precisions.append("bf16")
    for precision in precisions:
        for recompute in recomputes:
            for batch in batches:
                yield {**batch, "gradient_checkpointing": recompute, "precision": precision}


def _batches(config: PeftConfig, *, on_gpu: bool) -> Iterator[Mapping[str, Any]]:
    """Yield ways to split the effective batch, the largest pass first; a CPU gains nothing from a larger one."""
    passes = 1 if on_gpu else config.gradient_accumulation
    rows = config.batch_size * config.gradient_accumulation // passes
    yield {"batch_size": rows, "gradient_accumulation": passes}
    while rows > 1 and rows % 2 == 0:
        rows, passes = rows // 2, passes * 2
        yield {"batch_size": rows, "gradient_accumulation": passes}
