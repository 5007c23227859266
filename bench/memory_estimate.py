"""The memory estimate against measured peaks, ours and published ones.

    nice -n 10 python ../bench/memory_estimate.py --write ../docs/memory-estimate.md      (from backend/)

Measures our own engine on this CPU (a quarter of an hour on two idle cores; --save keeps the figures, --points reads
kept ones), reads published peaks from ../../shared/data where that is there, fits each constant on one half of the
points and judges on the other.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "backend"), str(ROOT / "bench")]

from memory_points import FITTED, JUDGED, Point, measure
from published_points import Published, read_points

from domain.activations import Batch, kept_by_layers, logits_bytes
from domain.architectures.registry import read_shape
from domain.memory_estimate import CPU, GPU, adapter_parameters, dense_bytes, estimate, weights_bytes
from domain.model_shape import ModelShape
from services.embedded_model import CONFIG, EmbeddedModel

GIB, MIB = 2**30, 2**20
_SHORT = 128  # tokens of a pass, below which DoRA's norms decide the peak
SHARED = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Judged:
    """A point: what was predicted, what was measured, in bytes, and whether the constants were fitted on it."""

    name: str
    predicted: float
    low: float
    high: float
    measured: int
    fitted: bool

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


def fit(features: np.ndarray, wanted: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Least squares of relative errors with coefficients of at least 0, over every subset of the features."""
    left, right = features / peaks[:, None], wanted / peaks
    best, found = np.inf, np.zeros(features.shape[1])
    for size in range(1, features.shape[1] + 1):
        for columns in itertools.combinations(range(features.shape[1]), size):
            part, *_ = np.linalg.lstsq(left[:, columns], right, rcond=None)
            rest = float(((left[:, columns] @ part - right) ** 2).sum())
            if (part >= 0).all() and rest < best:
                best, found = rest, np.zeros(features.shape[1])
                found[list(columns)] = part
    return found


def figures(points: Sequence[Judged]) -> dict[str, str]:
    """Sum a set of points up."""
    errors = sorted(abs(point.error) for point in points)
    inside = sum(point.low <= point.measured <= point.high for point in points)
    return {
        "points": str(len(points)),
        "median error": f"{statistics.median(errors):.1%}",
        "90th percentile": f"{errors[min(len(errors) - 1, int(0.9 * len(errors)))]:.1%}",
        "furthest under": f"{min(point.error for point in points):+.1%}",
        "furthest over": f"{max(point.error for point in points):+.1%}",
        "in the range": f"{inside} of {len(points)}",
    }


# Our own engine


def measured_points(path: Path | None, save: Path | None) -> list[dict[str, Any]]:
    """Read kept measurements, or measure the grid."""
    if path is not None:
        return list(json.loads(path.read_text()))
    with tempfile.TemporaryDirectory() as logs:
        model = EmbeddedModel(ROOT / ".cache", Path(logs)).prepare(lambda stage, fraction: None)
        rows = []
        for point in (*FITTED, *JUDGED):
            rows.append(measure(point, model))
            print(rows[-1], flush=True)
            if save is not None:
                save.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _name(point: Point) -> str:
    extras = [
        "checkpointing" if point.checkpointing else "",
        point.precision if point.precision != "fp32" else "",
        point.targets if point.targets != "all-linear" else "",
    ]
    words = f"{point.algorithm}, {point.batch} x {point.length} tokens, rank {point.rank}"
    return ", ".join([words, *filter(None, extras)])


def our_points(rows: list[dict[str, Any]]) -> tuple[list[Judged], dict[str, float]]:
    """Judge the estimate on our own engine; the constants fitted on one half are returned beside."""
    shape = read_shape(CONFIG)
    assert shape is not None
    judged, features, wanted, peaks, grown = [], [], [], [], []
    for row in rows:
        point = Point(**{name: row[name] for name in Point.__dataclass_fields__})
        config, peak = point.config(), row["peak_bytes"]
        batch = Batch(point.batch, point.length, point.batch > 1)
        found = estimate(shape, config, on_gpu=False, batch=batch)
        fitted = point in FITTED
        judged.append(Judged(_name(point), found.total_bytes, found.low_bytes, found.high_bytes, peak, fitted))
        trained = adapter_parameters(shape, config) * 12
        tensors = weights_bytes(shape, config) + trained + found.activations_bytes + found.logits_bytes
        dense = dense_bytes(shape, config)
        if config.use_dora:
            if fitted and point.batch * point.length < _SHORT:
                passes = found.activations_bytes + found.logits_bytes
                grown.append((peak - tensors + passes - CPU.overhead_bytes) / dense)
        elif fitted and peak > 1.02 * row["loaded_bytes"]:  # otherwise loading is what was measured
            layers = kept_by_layers(shape, config, batch, on_gpu=False).all_bytes
            quantized = config.quantization != "none"
            features.append(
                [MIB, layers * (not quantized), layers * quantized, trained, (config.init_weights == "pissa") * dense]
            )
            wanted.append(peak - tensors)
            peaks.append(peak)
    names = ("overhead_mib", "slack_layers", "slack_quantized", "slack_adapters", "slack_pissa")
    values = fit(np.array(features, float), np.array(wanted, float), np.array(peaks, float))
    constants = dict(zip(names, (float(value) for value in values), strict=True))
    return judged, constants | {"slack_dora": max(grown)}


# Published points


def _published_parts(point: Published) -> dict[str, float]:
    """Split a published point into what is known exactly and what the theory multiplies."""
    shape, config, program = point.shape, point.config, point.program
    weights = weights_bytes(shape, config)
    in_4_bits = config.quantization == "nf4"
    head = shape.vocab * shape.hidden if program.head_quantized and in_4_bits else 0
    if in_4_bits:
        stored = shape.linear_parameters + head
        weights = round(stored * program.nf4) + (shape.parameters - stored) * 2
    states = 1 / program.stack.adapter_width if config.optimizer == "adamw_8bit" else 1
    trained = adapter_parameters(shape, config) * program.stack.adapter_width * (1 + 2 * states)
    return {
        "exact": weights + trained,
        "activations": kept_by_layers(shape, config, point.batch, program.stack, on_gpu=True).peak_bytes,
        "logits": logits_bytes(shape, config, point.batch, program.stack),
        "kept inputs": _inputs(shape, point.batch) * 4.0 if in_4_bits and program.keeps_inputs else 0.0,
        "head in full": head * 2.0,
    }


def _inputs(shape: ModelShape, batch: Batch) -> int:
    """Count the elements that a forward pass puts into linear modules, shared inputs once."""
    total = 0
    for block in shape.blocks:
        linears = block.part.linears
        shared = {linear.reads: linear.fan_in for linear in linears if linear.reads in ("attention", "mlp")}
        own = sum(linear.fan_in for linear in linears if linear.reads not in shared)
        total += block.count * (sum(shared.values()) + own)
    return total * batch.tokens


def published_points(points: list[Published]) -> tuple[list[Judged], dict[str, float]]:
    """Judge the theory on published points whose metric is torch's, and what one half would make of its factors."""
    names = ("activations", "logits", "kept inputs", "head in full")
    judged, features, wanted, peaks = [], [], [], []
    for number, point in enumerate(points):
        parts = _published_parts(point)
        total = sum(parts.values())
        fitted = (number // 2) % 2 == 0  # by pairs: LoRA and QLoRA of a model alternate
        name = f"{point.model_id}, {point.program.name}, {point.config.quantization}, rank {point.config.rank}"
        judged.append(Judged(name, total, total * GPU.low, total * GPU.high, point.peak_bytes, fitted))
        if fitted:
            features.append([parts[name] for name in names])
            wanted.append(point.peak_bytes - parts["exact"])
            peaks.append(point.peak_bytes)
    values = fit(np.array(features, float), np.array(wanted, float), np.array(peaks, float))
    return judged, dict(zip(names, (float(value) for value in values), strict=True))


# The report


def table(points: Sequence[Judged]) -> list[str]:
    """Write points as a table in MiB."""
    lines = ["| point | predicted MiB | measured MiB | error | |", "|---|---:|---:|---:|---|"]
    for point in points:
        sizes = f"{point.predicted / MIB:,.0f} | {point.measured / MIB:,.0f}"
        lines.append(f"| {point.name} | {sizes} | {point.error:+.1%} | {'fitted on' if point.fitted else ''} |")
    return lines


def summary(groups: dict[str, Sequence[Judged]]) -> list[str]:
    """Write the figures of several sets as a table."""
    rows = {name: figures(points) for name, points in groups.items() if points}
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return lines + [f"| {name} | " + " | ".join(found.values()) + " |" for name, found in rows.items()]


def halves(points: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Return the points that were fitted on, and the others."""
    return [point for point in points if point.fitted], [point for point in points if not point.fitted]


def report(rows: list[dict[str, Any]], csv_path: Path, configs: Path) -> list[str]:
    """Write the document."""
    ours, constants = our_points(rows)
    on, off = halves(ours)
    in_use = {
        "overhead_mib": CPU.overhead_bytes / MIB,
        "slack_layers": CPU.slack_layers,
        "slack_quantized": CPU.slack_quantized,
        "slack_adapters": CPU.slack_adapters,
        "slack_dora": CPU.slack_dora,
        "slack_pissa": CPU.slack_pissa,
    }
    lines = [*_INTRODUCTION, "", "## Our own engine on a CPU", "", *_OURS, ""]
    lines += summary({"judged on": off, "fitted on": on})
    lines += [
        "",
        "Constants, as least squares would have them (of DoRA's, the largest seen), and in use:",
        "",
    ]
    lines += ["| constant | fitted | in use |", "|---|---:|---:|"]
    lines += [f"| {name} | {value:,.2f} | {in_use[name]:,.2f} |" for name, value in constants.items()]
    lines += ["", *table(ours)]
    if csv_path.is_file():
        lines += _published_report(csv_path, configs)
    return lines


def _published_report(csv_path: Path, configs: Path) -> list[str]:
    points, left_out = read_points(csv_path, configs)
    stated = [point for point in points if point.program.metric_is_torchs]
    judged, factors = published_points(stated)
    rest, _ = published_points([point for point in points if not point.program.metric_is_torchs])
    on, off = halves(judged)
    lines = ["", "## Published peaks on GPUs", "", *_PUBLISHED, ""]
    lines += summary({"judged on": off, "other half": on, "metric not torch's": rest})
    lines += ["", "| part | factor that one half asks for | in use |", "|---|---:|---:|"]
    lines += [f"| {name} | {value:.2f} | 1 |" for name, value in factors.items()]
    lines += ["", *[line.replace("fitted on", "other half") for line in table(judged)]]
    lines += ["", "Rows whose metric is not torch's own, for comparison only:", "", *table(rest)]
    lines += ["", "Rows left out:", "", "| line | model | why |", "|---:|---|---|"]
    return lines + [f"| {line} | {model} | {why} |" for line, model, why in left_out]


_INTRODUCTION = """
# The memory estimate against measured peaks

Made by `bench/memory_estimate.py`; nothing here is written by hand. Errors are predicted over measured, less one: a
minus sign means that the estimate was too low. Goals: median error at most 5 %, 90th percentile at most 15 %, the range
holds 95 % of the points, never more than 5 % under on our own engine.
""".strip().splitlines()
_OURS = """
One fresh engine process a point, SmolLM2-135M-Instruct, two optimizer steps, every token with loss; measured is VmHWM
of the engine from outside. Batches of several rows hold one padded row, so that an attention mask is passed. The
constants were chosen on one half of the points; the figures that count are those of the other half, whose lengths,
batches and ranks are others. What a heap loses differs from run to run, by some per cent with LoRA; where DoRA takes
the norm of every adapted weight, by hundreds of MiB (its shortest point was seen between 1,585 and 2,449 in ten runs):
there the constant is the most that was seen, and not the mean, so that the estimate is rather too high.
""".strip().splitlines()
_PUBLISHED = """
Measured with torch's allocator, so no overhead is added: weights, adapters and optimizer by count, activations and
logits by the formulas of `domain/activations.py` with the program's own widths. No factor is fitted: what one half of
the points would ask for is printed beside, as a check of the theory, and the range is that of the product.
""".strip().splitlines()


def main(arguments: argparse.Namespace) -> int:
    """Measure, judge, print, and say by the exit code whether the goals are met on our own engine."""
    rows = measured_points(arguments.points, arguments.save)
    lines = report(rows, arguments.csv, arguments.configs)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text, encoding="utf-8")
    ours, _ = our_points(rows)
    _, off = halves(ours)
    errors = sorted(abs(point.error) for point in off)
    met = statistics.median(errors) <= 0.05 and errors[int(0.9 * len(errors))] <= 0.15
    return 0 if met and min(point.error for point in off) >= -0.05 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, help="kept measurements instead of new ones")
    parser.add_argument("--save", type=Path, help="where to keep the measurements")
    parser.add_argument("--csv", type=Path, default=SHARED / "vram_points.csv")
    parser.add_argument("--configs", type=Path, default=SHARED / "configs")
    parser.add_argument("--write", type=Path, help="where to write the document")
    sys.exit(main(parser.parse_args()))
