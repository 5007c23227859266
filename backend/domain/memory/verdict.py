"""Whether an estimate fits, and what to change if it does not."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from domain.memory.activations import Batch, largest_batch, missing_targets
from domain.memory.estimate import Estimate, estimate, estimate_loading
from domain.memory.unsloth import UnslothHere
from domain.models.records import Verdict
from domain.models.shape import ModelShape
from domain.peft.config import PeftConfig
from domain.peft.targets import why_refused
from domain.peft.unsloth_rules import unmeasured

_SHORTEST = 128  # tokens; a shorter row holds no turn and answer
_SHORTEST_ALLOWED = 8  # the bound of max_seq_length
_LOWEST_RANK = 4
_MOST_PASSES = 1024  # the bound of gradient_accumulation
_WORTH_IT = 0.98  # a change that saves less than a fiftieth is none
_KEPT_ON_GPU = {"gradient_checkpointing": False}
_Change = tuple[str, dict[str, Any]]
_IN_4_BITS: _Change = (
    "quantization=nf4: the base's linear weights in 4 bits, as algorithm qlora has them",
    {"quantization": "nf4"},
)


@dataclass(frozen=True)
class Suggestion:
    """A change with what it would need.

    Attributes:
        change: It in words.
        overrides: It as overrides of the configuration; empty where another model is meant.
    """

    change: str
    overrides: Mapping[str, Any]
    estimate_bytes: int
    verdict: Verdict


@dataclass(frozen=True)
class Assessment:
    """A verdict with what led to it.

    Attributes:
        estimate: None where nothing is known of the model's layers.
        blockers: What keeps the model from being trained here, however much memory there is.
    """

    verdict: Verdict
    available_bytes: int | None
    estimate: Estimate | None
    reasons: list[str] = field(default_factory=list)
    suggestions: list[Suggestion] = field(default_factory=list)
    blockers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sibling:
    """A model of the same family that could be taken instead."""

    model_id: str
    shape: ModelShape


def judge(needed: Estimate, available_bytes: int, unsloth: UnslothHere | None = None) -> Verdict:
    """Compare an estimate with what is free: tight where only the range's upper end does not fit.

    What Unsloth's checkpointing puts into host memory must fit there.
    """
    if needed.total_bytes > available_bytes or _lacks_host_memory(needed, unsloth):
        return "does_not_fit"
    return "tight" if needed.high_bytes > available_bytes else "fits"


def _lacks_host_memory(needed: Estimate, unsloth: UnslothHere | None) -> bool:
    host = unsloth.host_available_bytes if unsloth is not None else None
    return host is not None and needed.host_bytes > host


def judge_run(
    shape: ModelShape | None,
    config: PeftConfig,
    available_bytes: int | None,
    *,
    on_gpu: bool,
    batch: Batch | None = None,
    unsloth: UnslothHere | None = None,
) -> Assessment:
    """Estimate a fine-tune and judge it, without asking what would make it fit.

    Args:
        shape: The model; None where its layers are not known.
        config: The configuration.
        available_bytes: What is free on the device; None where it does not say.
        on_gpu: Whether the device is a CUDA GPU.
        batch: The largest forward pass, if more is known of the data than the configuration allows.
        unsloth: Unsloth, where the device has it.

    Returns:
        The assessment. What is not known is `unknown`, never `fits`.
    """
    if shape is None:
        reason = "what the model is made of is not known"
        return Assessment("unknown", available_bytes, None, [reason])
    blockers = _blockers(shape, config)
    needed = estimate(shape, config, on_gpu=on_gpu, batch=batch, unsloth=unsloth, available_bytes=available_bytes)
    reasons = _reasons(config, batch, needed, available_bytes, unsloth)
    if needed.engine == "unsloth" and (caution := unmeasured(shape.family)) is not None:
        reasons.append(caution)
    known = available_bytes is not None and not blockers
    verdict = judge(needed, available_bytes, unsloth) if known and available_bytes is not None else "unknown"
    return Assessment(verdict, available_bytes, needed, reasons, [], blockers)


def assess(
    shape: ModelShape | None,
    config: PeftConfig,
    available_bytes: int | None,
    *,
    on_gpu: bool,
    batch: Batch | None = None,
    unsloth: UnslothHere | None = None,
    siblings: Callable[[ModelShape], Sequence[Sibling]] | None = None,
) -> Assessment:
    """Judge a fine-tune as `judge_run` does, and say what would make it fit.

    Args:
        siblings: Finds models that could be taken instead; asked only if the fine-tune does not fit.
    """
    assessment = judge_run(shape, config, available_bytes, on_gpu=on_gpu, batch=batch, unsloth=unsloth)
    if (
        shape is None
        or available_bytes is None
        or assessment.estimate is None
        or assessment.verdict in ("fits", "unknown")
    ):
        return assessment

    def judge_sibling(other: ModelShape, changed: PeftConfig) -> Assessment:
        shrunk = _shrunk(batch, changed)
        return judge_run(other, changed, available_bytes, on_gpu=on_gpu, batch=shrunk, unsloth=unsloth)

    changes = _suggest(shape, config, assessment.estimate, available_bytes, on_gpu=on_gpu, batch=batch, unsloth=unsloth)
    if siblings is not None:
        changes += _smaller(shape, config, siblings(shape), judge_sibling)
    return replace(assessment, suggestions=changes)


def assess_loading(
    shape: ModelShape | None,
    config: PeftConfig,
    available_bytes: int | None,
    *,
    on_gpu: bool,
    siblings: Callable[[ModelShape], Sequence[Sibling]] | None = None,
) -> Assessment:
    """Estimate the load of a base alone and judge it; arguments and result as in `assess`."""
    assessment = _judge_loading(shape, config, available_bytes, on_gpu=on_gpu)
    if shape is None or available_bytes is None or assessment.verdict != "does_not_fit":
        return assessment

    def judge_sibling(other: ModelShape, changed: PeftConfig) -> Assessment:
        return _judge_loading(other, changed, available_bytes, on_gpu=on_gpu)

    changes = []
    if _can_be_quantized(shape, config):
        smaller = estimate_loading(shape, config.model_copy(update={"quantization": "nf4"}), on_gpu=on_gpu)
        changes.append(Suggestion(*_IN_4_BITS, smaller.total_bytes, judge(smaller, available_bytes)))
    if siblings is not None:
        changes += _smaller(shape, config, siblings(shape), judge_sibling)
    return replace(assessment, suggestions=changes)


def _judge_loading(
    shape: ModelShape | None, config: PeftConfig, available_bytes: int | None, *, on_gpu: bool
) -> Assessment:
    if shape is None:
        return Assessment("unknown", available_bytes, None)
    needed = estimate_loading(shape, config, on_gpu=on_gpu)
    blockers = _blockers(shape, config)
    if available_bytes is None or blockers:
        return Assessment("unknown", available_bytes, needed, [], [], blockers)
    return Assessment(judge(needed, available_bytes), available_bytes, needed)


def savings(shape: ModelShape, config: PeftConfig, *, on_gpu: bool, unsloth: UnslothHere | None = None) -> list[str]:
    """Say what to change after a run for which the memory did not suffice, each with what it is estimated to save.

    Each change is the mildest of its kind, in the order in which a practitioner would try them.
    """
    before = estimate(shape, config, on_gpu=on_gpu, unsloth=unsloth).total_bytes
    advice = []
    for (change, values), *_ in _changes(shape, config):
        changed = config.model_copy(update=values)
        after = estimate(shape, changed, on_gpu=on_gpu, unsloth=unsloth).total_bytes
        if after < _WORTH_IT * before:
            advice.append(f"{change} (needs about {(before - after) / 1e9:.2g} GB less)")
    return advice


def _blockers(shape: ModelShape, config: PeftConfig) -> list[str]:
    blockers = []
    if shape.stored is not None:
        if shape.stored.method != "bitsandbytes":
            blockers.append(f"the weights are published in {shape.stored.method}, which this engine does not train on")
        elif config.quantization != "none":
            blockers.append("the weights are quantised already: use quantization 'none'")
    if missing := missing_targets(shape, config.target_modules):
        known = {linear.path.rpartition(".")[2] for linear, _ in shape.linears()}
        blockers.append(why_refused(missing, known, tied=shape.tied_embeddings))
    return blockers


def _reasons(
    config: PeftConfig,
    batch: Batch | None,
    needed: Estimate,
    available: int | None,
    unsloth: UnslothHere | None,
) -> list[str]:
    batch = largest_batch(config) if batch is None else batch
    rows, length = batch.rows, batch.length
    reasons = [f"{rows} rows of {length} tokens, {rows * length} a forward pass, are assumed"]
    if needed.engine == "unsloth":
        reasons.append("Unsloth would hold the base: its kernels, loss and checkpointing are counted")
    if needed.host_bytes:
        free = unsloth.host_available_bytes if unsloth is not None else None
        reasons.append(
            f"Unsloth's checkpointing takes {needed.host_bytes} bytes of host memory"
            + (f", {free} available" if free is not None else "")
        )
    if available is None:
        return [*reasons, "the device does not say what is free"]
    return [*reasons, f"{needed.total_bytes} bytes estimated, {available} available"]


# Suggestions


def _suggest(
    shape: ModelShape,
    config: PeftConfig,
    needed: Estimate,
    available_bytes: int,
    *,
    on_gpu: bool,
    batch: Batch | None,
    unsloth: UnslothHere | None,
) -> list[Suggestion]:
    """Propose changes in the order a practitioner would try them: what costs nothing in quality first.

    Each is estimated on its own. If none of them is enough, the shortest sequence of them that is comes last.
    """

    def with_changes(change: str, values: Mapping[str, Any]) -> Suggestion:
        changed = config.model_copy(update=dict(values))
        shrunk = _shrunk(batch, changed)
        after = estimate(shape, changed, on_gpu=on_gpu, batch=shrunk, unsloth=unsloth, available_bytes=available_bytes)
        return Suggestion(change, values, after.total_bytes, judge(after, available_bytes, unsloth))

    if _lacks_host_memory(needed, unsloth):
        kept = with_changes("gradient_checkpointing=false: nothing is kept in host memory", _KEPT_ON_GPU)
        if kept.verdict in ("fits", "tight"):
            return [kept]
    single = [_mildest_that_fits(with_changes(*option) for option in options) for options in _changes(shape, config)]
    useful = [item for item in single if item.estimate_bytes < _WORTH_IT * needed.total_bytes]
    if any(item.verdict in ("fits", "tight") for item in useful):
        return useful
    words, together = [], dict[str, Any]()
    for item in useful:
        words.append(item.change)
        together |= item.overrides
        combined = with_changes(" and ".join(words), dict(together))
        if combined.verdict in ("fits", "tight"):
            return [*useful, combined]
    return useful


def _shrunk(batch: Batch | None, config: PeftConfig) -> Batch | None:
    if batch is None:
        return None
    rows, length = min(batch.rows, largest_batch(config).rows), min(batch.length, config.max_seq_length)
    return Batch(rows, length, config.packing or rows > 1, batch.trained)


def _mildest_that_fits(degrees: Iterator[Suggestion]) -> Suggestion:
    """Return the first of several degrees of one change that fits, or the last and strongest."""
    for suggestion in degrees:
        if suggestion.verdict in ("fits", "tight"):
            break
    return suggestion


def _changes(shape: ModelShape, config: PeftConfig) -> Iterator[list[_Change]]:
    """Yield the changes in order, each as degrees from mild to strong."""
    if _can_be_quantized(shape, config):
        yield [_IN_4_BITS]
    if not config.gradient_checkpointing:
        yield [("gradient_checkpointing=true: activations are computed twice", {"gradient_checkpointing": True})]
    rows = list(_smaller_batches(config))
    if rows:
        yield rows
    lengths = [config.max_seq_length // part for part in (2, 4, 8) if config.max_seq_length // part >= _SHORTEST]
    if lengths:
        yield [(f"max_seq_length={length}: longer rows are cut", {"max_seq_length": length}) for length in lengths]
    ranks = [config.rank // part for part in (2, 4, 8) if config.rank // part >= _LOWEST_RANK]
    if ranks:
        yield [(f"rank={rank}", {"rank": rank, "alpha": _alpha(config, rank)}) for rank in ranks]
    if config.target_experts is True and shape.has_experts:
        yield [("target_experts=false: the experts stay as they are", {"target_experts": False})]


def _can_be_quantized(shape: ModelShape, config: PeftConfig) -> bool:
    """Tell whether fewer bits can be asked for; of weights that are published in few, it is refused."""
    return config.quantization == "none" and shape.stored is None


def _alpha(config: PeftConfig, rank: int) -> int:
    return max(1, round(config.alpha * rank / config.rank))


def _smaller_batches(config: PeftConfig) -> Iterator[_Change]:
    """Halve the rows of a pass and double the passes of a step, down to one row: the effective batch stays."""
    rows, effective = config.batch_size, config.batch_size * config.gradient_accumulation
    while rows > 1:
        rows //= 2
        passes = math.ceil(effective / rows)
        if passes > _MOST_PASSES:
            return
        yield (
            f"batch_size={rows} with gradient_accumulation={passes}: the effective batch stays",
            {"batch_size": rows, "gradient_accumulation": passes},
        )


def _smaller(
    shape: ModelShape,
    config: PeftConfig,
    siblings: Sequence[Sibling],
    judge_sibling: Callable[[ModelShape, PeftConfig], Assessment],
) -> list[Suggestion]:
    """Propose the largest sibling that fits as everything else stands, if there is one.

    Args:
        judge_sibling: Judges it by what the model itself was judged by.
    """
    smaller = [item for item in siblings if item.shape.parameters < shape.parameters]
    for item in sorted(smaller, key=lambda item: -item.shape.parameters):
        length = min(config.max_seq_length, item.shape.max_positions or config.max_seq_length)
        assessment = judge_sibling(item.shape, config.model_copy(update={"max_seq_length": length}))
        if assessment.estimate is not None and assessment.verdict in ("fits", "tight") and length >= _SHORTEST_ALLOWED:
            return [
                Suggestion(
                    f"the smaller model {item.model_id}", {}, assessment.estimate.total_bytes, assessment.verdict
                )
            ]
    return []
