"""The estimate for our own engine. It is measured with each allocator, judged, and written to the document."""

import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from judged import MIB, Judged, fit, halves, summary, table
from memory_points import (
    ELSEWHERE,
    FITTED,
    JUDGED,
    LARGE,
    LARGE_SHAPE,
    LONGER,
    SMALL,
    Point,
    make_large,
    measure,
    use_allocator,
)
from model_shapes import read_shape

from domain.memory import estimate as estimate_module
from domain.memory.activations import Batch, kept_by_layers
from domain.memory.estimate import (
    GLIBC,
    TCMALLOC,
    Platform,
    adapter_parameters,
    dense_bytes,
    estimate,
    loading_bytes,
    weights_bytes,
)
from domain.peft.config import PeftConfig
from services.models.embedded import CONFIG, EmbeddedModel

PLATFORMS = {"tcmalloc": TCMALLOC, "glibc": GLIBC}
SHAPES = {SMALL: read_shape(dict(CONFIG)), LARGE: read_shape({**CONFIG, **LARGE_SHAPE})}


def measured_points(cache: Path, save: Path | None) -> list[dict[str, Any]]:
    """Measure the grid with each allocator that is installed."""
    with tempfile.TemporaryDirectory() as scratch:
        small = EmbeddedModel(cache, Path(scratch)).prepare(lambda stage, fraction: None)
        models = {SMALL: small, LARGE: make_large(Path(scratch) / "large", small)}
        rows = []
        for name, point in itertools.product(PLATFORMS, (*FITTED, *JUDGED, *ELSEWHERE, *LONGER)):
            if not use_allocator(name):
                continue
            rows.append(measure(point, models[point.model]))
            print(rows[-1], flush=True)
            if save is not None:
                save.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


@contextmanager
def constants_of(platform: Platform) -> Iterator[None]:
    """Make the estimate use these constants for a CPU."""
    before = estimate_module.platform
    estimate_module.platform = lambda *, on_gpu: estimate_module.GPU if on_gpu else platform
    try:
        yield
    finally:
        estimate_module.platform = before


def _name(point: Point) -> str:
    extras = [
        "checkpointing" if point.checkpointing else "",
        point.precision if point.precision != "fp32" else "",
        point.targets if point.targets != "all-linear" else "",
        f"dropout {point.dropout:g}" if point.dropout is not None else "",
        f"{point.accumulation} passes a step" if point.accumulation > 1 else "",
        point.model if point.model != SMALL else "",
        f"{point.steps} steps of every length up to that" if point.mixed else "",
    ]
    words = f"{point.algorithm}, {point.batch} x {point.length} tokens, rank {point.rank}"
    return ", ".join([words, *filter(None, extras)])


def point_of(row: Mapping[str, Any]) -> Point:
    """Return the point of a kept measurement."""
    return Point(**{name: row[name] for name in Point.__dataclass_fields__ if name in row})


def judge(rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Estimate every measured run with the constants of its allocator."""
    judged = []
    for row in rows:
        point, shape = point_of(row), SHAPES[point_of(row).model]
        assert shape is not None
        batch = Batch(point.batch, point.length, point.batch > 1, even=not point.mixed)
        with constants_of(PLATFORMS[row["allocator"]]):
            estimated = estimate(shape, point.config(), on_gpu=False, batch=batch)
        sizes = estimated.total_bytes, estimated.low_bytes, estimated.high_bytes, row["peak_bytes"]
        judged.append(Judged(_name(point), *sizes, point in FITTED))
    return judged


def fitted_constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Fit the constants of one allocator, on those of its fitted points whose peak is not that of loading."""
    shape = SHAPES[SMALL]
    assert shape is not None
    features, wanted, peaks = [], [], []
    for row in rows:
        point, peak = point_of(row), row["peak_bytes"]
        if point not in FITTED or peak <= 1.02 * row["loaded_bytes"]:
            continue
        config, batch = point.config(), Batch(point.batch, point.length, point.batch > 1, even=not point.mixed)
        estimated = estimate(shape, config, on_gpu=False, batch=batch)
        layers = kept_by_layers(shape, config, batch, on_gpu=False)
        plain, extras = layers.plain_bytes, layers.all_bytes - layers.plain_bytes
        trained, quantized = adapter_parameters(shape, config) * 12, config.quantization != "none"
        decomposed = (config.init_weights == "pissa") * dense_bytes(shape, config)
        features.append([MIB, plain * (not quantized), plain * quantized, extras, trained, decomposed])
        tensors = weights_bytes(shape, config) + trained + estimated.activations_bytes + estimated.logits_bytes
        wanted.append(peak - tensors)
        peaks.append(peak)
    values = fit(np.array(features, float), np.array(wanted, float), np.array(peaks, float))
    names = (
        "overhead and training, MiB",
        "slack_layers",
        "slack_quantized",
        "slack_extras",
        "slack_adapters",
        "slack_pissa",
    )
    return dict(zip(names, (float(value) for value in values), strict=True))


def fitted_loading(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Fit the memory that loading takes beside the weights and the file, on the fitted points that convert weights."""
    shape = SHAPES[SMALL]
    assert shape is not None
    features, wanted, peaks = [], [], []
    for row in rows:
        point, config = point_of(row), point_of(row).config()
        if point not in FITTED or config.precision == "bf16":
            continue
        passing = shape.linear_parameters * shape.published_width * (config.quantization != "none")
        features.append([MIB, passing])
        wanted.append(row["loaded_bytes"] - weights_bytes(shape, config) - shape.parameters * shape.published_width)
        peaks.append(row["loaded_bytes"])
    values = fit(np.array(features, float), np.array(wanted, float), np.array(peaks, float))
    return dict(zip(("overhead, MiB", "slack_loading"), (float(value) for value in values), strict=True))


def loads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a table of the estimated and the measured memory of loading, by model and storage of its weights."""
    kinds: dict[tuple[str, str, str], list[int]] = {}
    configs: dict[tuple[str, str, str], PeftConfig] = {}
    for row in rows:
        point, config = point_of(row), point_of(row).config()
        key = (point.model, config.quantization, config.precision)
        kinds.setdefault(key, []).append(row["loaded_bytes"])
        configs[key] = config
    lines = ["| loading | predicted MiB | measured MiB, median (least to most) | error |", "|---|---:|---:|---:|"]
    for (model, quantization, precision), measured in kinds.items():
        shape = SHAPES[model]
        assert shape is not None
        with constants_of(PLATFORMS[rows[0]["allocator"]]):
            predicted = loading_bytes(shape, configs[model, quantization, precision], on_gpu=False)
        middle = statistics.median(measured)
        span = f"{middle / MIB:,.0f} ({min(measured) / MIB:,.0f} to {max(measured) / MIB:,.0f})"
        held = precision if quantization == "none" else f"{quantization}, computes in {precision}"
        lines.append(f"| {model}, {held} | {predicted / MIB:,.0f} | {span} | {predicted / middle - 1:+.1%} |")
    return lines


def section(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the section of one allocator's points."""
    platform, judged = PLATFORMS[name], judge(rows)
    pairs = [(judgement, point_of(row)) for judgement, row in zip(judged, rows, strict=True)]
    on, off = halves([judgement for judgement, point in pairs if point not in (*ELSEWHERE, *LONGER)])
    elsewhere = [judgement for judgement, point in pairs if point in ELSEWHERE]
    longer = [judgement for judgement, point in pairs if point in LONGER]
    in_use = (
        platform.overhead_bytes / MIB,
        platform.slack_loading,
        (platform.overhead_bytes + platform.training_bytes) / MIB,
        platform.slack_layers,
        platform.slack_quantized,
        platform.slack_extras,
        platform.slack_adapters,
        platform.slack_pissa,
    )
    lines = summary({"judged on": off, "another model": elsewhere, "longer runs": longer, "fitted on": on})
    missed = goals_missed(rows)
    lines += ["", f"Goals missed by the points that nothing was fitted on: {'; '.join(missed) or 'none'}.", ""]
    lines += ["Constants, as least squares would have them, and in use:", ""]
    lines += ["| constant | fitted | in use |", "|---|---:|---:|"]
    constants = (fitted_loading(rows) | fitted_constants(rows)).items()
    lines += [f"| {name} | {value:,.2f} | {used:,.2f} |" for (name, value), used in zip(constants, in_use, strict=True)]
    lines += ["", *table(judged), "", *loads(rows), ""]
    return [
        *lines,
        "Where nothing is converted, as in bf16, the file's pages are the weights: the first pass reads them.",
    ]


def goals_missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the goals that are missed by the points on which nothing was fitted; none if there are no points."""
    if not rows:
        return []
    judged = [point for point in judge(rows) if not point.fitted]
    errors = sorted(abs(point.error) for point in judged)
    inside = sum(point.low <= point.measured <= point.high for point in judged)
    checks = {
        "median error at most 5 %": statistics.median(errors) <= 0.05,
        "90th percentile at most 15 %": errors[int(0.9 * len(errors))] <= 0.15,
        "95 % in the range": inside >= 0.95 * len(judged),
        "never more than 5 % under": min(point.error for point in judged) >= -0.05,
    }
    return [goal for goal, met in checks.items() if not met]
