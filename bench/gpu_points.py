"""The memory estimate for bases that Unsloth holds, against peaks measured on a GPU.

    python ../bench/gpu_points.py --write ../docs/memory-estimate.md      (from backend/)

It prints the section on GPUs of that document; --write puts it in place of the one that is there.

The figures are this project's own (docs/gpu.md): the most that torch reserved, so that the context and the libraries,
which the estimate counts as overhead, are left out of both.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("backend", "bench")]

from domain.configure import MachineFacts, configure
from domain.memory.activations import Batch, Stack
from domain.memory.estimate import GPU, estimate
from domain.memory.unsloth import UnslothHere
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm

MACHINE = MachineFacts(has_gpu=True, supports_bf16=True, unsloth=UnslothHere())
MEDIAN, UNDER, OVER = 0.05, -0.05, 0.15  # the goals


@dataclass(frozen=True)
class Point:
    """A peak of a model of Llama-3.2-1B's shape.

    Attributes:
        overrides: Settings other than the defaults.
        even: Whether every pass was as large.
        on_unsloth: Whether Unsloth held the base; else the transformers engine, as it was with all logits.
    """

    algorithm: Algorithm
    rows: int
    length: int
    overrides: dict[str, Any]
    even: bool
    peak_bytes: int
    on_unsloth: bool = True

    @property
    def name(self) -> str:
        """Engine, method, size and settings."""
        checkpointed = "checkpointing" if self.overrides["gradient_checkpointing"] else "no checkpointing"
        engine = "Unsloth" if self.on_unsloth else "transformers"
        return f"{engine}, {self.algorithm.value}, {self.rows} x {self.length} tokens, {checkpointed}"


def _checked(algorithm: Algorithm, peak_bytes: int, *, on_unsloth: bool = True) -> Point:
    """Return a point of `make gpu-check`: rows that are all full."""
    overrides: dict[str, Any] = {"gradient_checkpointing": True, "optimizer": "adamw"}
    if algorithm is not Algorithm.PISSA:
        overrides["dropout"] = 0.0
    return Point(algorithm, 2, 2048, overrides, True, peak_bytes, on_unsloth)


def _job(algorithm: Algorithm, peak_bytes: int) -> Point:
    """Return a point of a job over HTTP. What was not written down is taken to be the default: dropout 0.05."""
    overrides: dict[str, Any] = {"gradient_checkpointing": False, "optimizer": "adamw_8bit", "dropout": 0.05}
    return Point(algorithm, 8, 786, overrides, False, peak_bytes)


# NVIDIA H200, 2026-11-27, torch 2.11.0, unsloth 2026.10.7.
POINTS = [
    _checked(Algorithm.QLORA, 2449473536),
    _checked(Algorithm.LORA, 3883925504),
    _checked(Algorithm.DORA, 4575985664),
    _checked(Algorithm.PISSA, 3886022656),
    _job(Algorithm.QLORA, 10341056512),
    _job(Algorithm.LORA, 11754536960),
]
WITH_ALL_LOGITS = [
    _checked(Algorithm.QLORA, 10074718208, on_unsloth=False),
    _checked(Algorithm.LORA, 11496587264, on_unsloth=False),
    _checked(Algorithm.DORA, 11504975872, on_unsloth=False),
]


def predicted(point: Point, shape: ModelShape) -> int:
    """Return the estimate of a point without what torch's allocator does not see."""
    values = {"batch_size": point.rows, "max_seq_length": point.length, "gradient_accumulation": 1}
    config = configure(point.algorithm, use_case=None, overrides=values | point.overrides, machine=MACHINE).config
    batch = Batch(point.rows, point.length, masked=not point.even, even=point.even)
    unsloth = MACHINE.unsloth if point.on_unsloth else None
    needed = estimate(shape, config, on_gpu=True, batch=batch, stack=Stack(), unsloth=unsloth)
    return needed.total_bytes - GPU.overhead_bytes


def error(point: Point, shape: ModelShape) -> float:
    """Return predicted over measured, less one."""
    return predicted(point, shape) / point.peak_bytes - 1


def goals_missed(errors: list[float]) -> list[str]:
    """Say which goals a set of errors misses."""
    middle = statistics.median(abs(value) for value in errors)
    missed = [f"median error {middle:.1%} over {MEDIAN:.0%}"] if middle > MEDIAN else []
    missed += [f"{min(errors):+.1%} is too far under"] if min(errors) < UNDER else []
    return missed + ([f"{max(errors):+.1%} is too far over"] if max(errors) > OVER else [])


def section(shape: ModelShape) -> list[str]:
    """Write the section of docs/memory-estimate.md."""
    errors = [error(point, shape) for point in POINTS]
    undropped = [replace(point, overrides=point.overrides | {"dropout": 0.0}) for point in POINTS if not point.even]
    least, most = (f"{value:+.1%}" for value in sorted(error(point, shape) for point in undropped))
    middle = statistics.median(abs(value) for value in errors)
    return [
        *_TITLE,
        *_TEXT,
        "",
        *_table(POINTS, shape),
        "",
        f"{len(errors)} points; median error {middle:.1%}, {min(errors):+.1%} to {max(errors):+.1%}. "
        f"Goals missed: {'; '.join(goals_missed(errors)) or 'none'}.",
        "",
        "The dropout of the two points without checkpointing was not written down; the default is assumed, 0.05.",
        f"Without it their errors would be {least} and {most}.",
        "",
        *_OTHERS,
        "",
        *_table(WITH_ALL_LOGITS, shape),
    ]


def _table(points: list[Point], shape: ModelShape) -> list[str]:
    lines = ["| point | predicted MiB | measured MiB | error |", "|---|---:|---:|---:|"]
    for point in points:
        mebibytes = [f"{value / 2**20:,.0f}" for value in (predicted(point, shape), point.peak_bytes)]
        lines.append(f"| {point.name} | {' | '.join(mebibytes)} | {error(point, shape):+.1%} |")
    return lines


def with_section(document: str, lines: list[str]) -> str:
    """Return a document with the section as its last, in place of the one that it has."""
    before = document.partition(f"\n{_TITLE[0]}\n")[0]
    return before.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"


_TITLE = ["## By engine, on a GPU", ""]
_TEXT = """
Made by `bench/gpu_points.py` from this project's own figures of one NVIDIA H200 (`docs/gpu.md`), for a model of the
shape of Llama-3.2-1B. Measured is the most that torch reserved; the context and the libraries are left out of both. The
formulas are read off Unsloth's source (`domain/memory/unsloth.py`). Two things were chosen by these points: that a
logit takes 8 bytes in the compiled loss, where the graph could also have kept 4 or 14; and that the allocator loses
nothing.

Not measured: other cards, models and families; longer rows; packed rows; fp16; adapters on some of the modules only;
GPUs with less than 8 GiB free, where the loss takes smaller chunks; and the host memory that checkpointing takes. These
are counted by the code alone.
""".strip().splitlines()
_OTHERS = """
The transformers engine held all logits then. It computes its loss by chunks since, and has not been measured on a GPU
again; these are its points as it was, and the estimate for a program that holds all logits:
""".strip().splitlines()


def llama_1b() -> ModelShape:
    """Return the shape of the model that was measured."""
    from gpu_check.shapes import SHAPES
    from model_shapes import read_shape

    shape = read_shape(SHAPES["Llama-3.2-1B"])
    assert shape is not None
    return shape


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the document that has the section")
    document = parser.parse_args().write
    made = section(llama_1b())
    print("\n".join(made))
    if document is not None:
        document.write_text(with_section(document.read_text(encoding="utf-8"), made), encoding="utf-8")
