"""The table, on the screen and in docs/gpu.md."""

import re
from typing import Any

from gpu_check.verdicts import Row

_GIB = 2**30
_SIGNS = {True: "yes", False: "**NO**", None: "–"}
CHECKS = ("trains", "resumes", "merges", "agrees with the other engine", "agrees with TRL")
GOAL_SPEED, GOAL_MEMORY = 2.0, 0.4  # QLoRA with checkpointing at 2,048 tokens, against TRL


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value / _GIB:.2f} GiB"


def _ratio(value: float, other: float | None) -> str:
    return "–" if not other else f"{value / other:.2f}"


def table(rows: list[Row]) -> list[str]:
    """Return the table of what is proved, as Markdown."""
    head = ["model", "method", "engine", *CHECKS, "predicted", "measured", "measured / predicted", "tokens/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        peak, predicted = row.measured.get("peak_bytes"), row.predicted_bytes
        speed = row.measured.get("tokens_per_s")
        cells = [
            row.case.model,
            row.case.algorithm.value,
            row.case.engine,
            *(_SIGNS[row.checks.get(name)] for name in CHECKS),
            _gib(predicted),
            _gib(peak),
            _ratio(peak, predicted) if peak else "–",
            f"{speed:,.0f}" if speed else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def against_trl(rows: list[Row], peers: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of speed and memory beside TRL's, as Markdown."""
    head = ["model", "method", "engine", "tokens/s", "over TRL", "peak", "over TRL"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        trl = peers.get(f"{row.case.model}-{row.case.algorithm.value}")
        speed, peak = row.measured.get("tokens_per_s"), row.measured.get("peak_bytes")
        if trl is None or "error" in trl or speed is None:
            continue
        cells = [
            row.case.model, row.case.algorithm.value, row.case.engine, f"{speed:,.0f}",
            _ratio(speed, trl["tokens_per_s"]), _gib(peak), _ratio(peak, trl["peak_bytes"]) if peak else "–",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def keep_earlier(earlier: str, title: str, report: str) -> str:
    """Return a document with a new report in it, behind its introduction and before the reports that it has.

    Args:
        earlier: The document so far. What it says of other cards and other days stays.
        title: The card and the day. A report of the same title is replaced.
        report: What `document` returns.
    """
    # The report's headings go one level down; no line of it is code, so each `#` at a line's start is a heading.
    body = re.sub(r"^#", "##", report, flags=re.MULTILINE)
    introduction, *sections = re.split(r"^(?=## )", earlier, flags=re.MULTILINE)
    others = [section for section in sections if section.splitlines()[0] != f"## {title}"]
    start = introduction if introduction.strip() else "# Measured on GPUs\n\n"
    return start + f"## {title}\n\n" + body.partition("\n")[2].strip() + "\n\n" * bool(others) + "".join(others)


def document(
    machine: list[str],
    rows: list[Row],
    peers: dict[str, dict[str, Any]],
    left_out: list[str],
    *,
    on_cpu: bool,
    over: bool = True,
) -> str:
    """Return the whole report as Markdown; of what there is so far, if the check is not over."""
    memory = "not measured on a CPU" if on_cpu else "the most that torch reserved on the GPU"
    problems = [f"- {row.case.id}: {problem}" for row in rows for problem in row.problems]
    problems += [f"- TRL on {name}: {trl['error']}" for name, trl in peers.items() if "error" in trl]
    parts = [
        "# What was proved " + ("on a CPU: the steps that one can do" if on_cpu else "on a GPU"),
        "",
        "Written by `make gpu-check`: random weights at real shapes, the same rows and settings for every run of a",
        f"model, no network. Memory is {memory}; tokens/s is the median step after two of warm-up.",
        "",
        *(f"- {line}" for line in machine),
        *([] if over else ["- **This check was not over when this was written.**"]),
        "",
        "## Every method, on every engine that takes it",
        "",
        *table(rows),
        "",
        "How each adapter computed:",
        "",
        *(f"- {row.case.id}: {row.measured['computation']}" for row in rows if "computation" in row.measured),
        "",
        "## Beside transformers + PEFT + TRL, the same work",
        "",
        *against_trl(rows, peers),
        "",
        f"Goals for Unsloth: QLoRA with checkpointing at 2,048 tokens at ≥ {GOAL_SPEED:g}× the tokens/s and",
        f"≤ {GOAL_MEMORY:g}× the memory of TRL.",
        "",
        "## What failed",
        "",
        *(problems or ["Nothing."]),
        "",
        "## What was left out",
        "",
        *([f"- {line}" for line in left_out] or ["Nothing."]),
        "",
    ]
    return "\n".join(parts)
