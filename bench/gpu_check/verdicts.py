"""Judges what the worker measured: which checks have passed."""

import math
from dataclasses import dataclass, field
from typing import Any

from gpu_check.plan import RESUME_AT, STEPS, Case

# Relative differences of losses. On a CPU a run repeats itself to the bit. On a GPU the order of sums varies, and
# bf16 has 8 bits of mantissa: a step's loss may differ by one part in 2^8, and drift for some steps after.
RESUME = {"cpu": 0.0, "gpu": 0.01}
AGREE = 0.02
# The merged model is rounded to the type of the base's files; a 4-bit base is dequantised into it.
MERGED = {"none": 0.005, "nf4": 0.02, "int8": 0.02}


@dataclass
class Row:
    """One line of the table. A check is True, False, or None where it could not be made."""

    case: Case
    checks: dict[str, bool | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    predicted_bytes: int | None = None

    def record(self, name: str, good: bool | None, why: str) -> None:
        """Record a check, and why it failed if it did."""
        self.checks[name] = good
        if good is False:
            self.problems.append(f"{name}: {why}")


def difference(left: list[float], right: list[float]) -> float:
    """Return the largest relative difference of two loss curves; infinite where they are not of one length."""
    if len(left) != len(right) or not left or not all(map(math.isfinite, left + right)):
        return math.inf
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(left, right, strict=True))


def judge(case: Case, answers: dict[str, dict[str, Any]], *, on_cpu: bool) -> Row:
    """Judge the checks of one case."""
    row = Row(case)
    proved, merged = answers.get(f"prove:{case.id}"), answers.get(f"merged:{case.id}")
    if proved is None or "error" in proved:
        row.record("trains", False, (proved or {}).get("error", "the process ended without an answer"))
        return row
    row.measured = proved
    losses = proved["losses"]
    finite = len(losses) == STEPS and all(map(math.isfinite, losses))
    learned = finite and losses[-1] < losses[0] and proved["after"] < proved["before"]
    row.record("trains", learned, f"losses {losses}, held out {proved['before']} → {proved['after']}")
    off = difference(losses[RESUME_AT:], proved["resumed_losses"])
    resumed = proved["resumed_from"] == RESUME_AT and off <= RESUME["cpu" if on_cpu else "gpu"]
    row.record("resumes", resumed, f"from step {proved['resumed_from']}, losses differ by {off:.2%}")
    if merged is not None and "left_out" in merged:
        row.record("merges", None, merged["left_out"])
    elif merged is None or "error" in merged:
        row.record("merges", False, (merged or {}).get("error", "the process ended without an answer"))
    else:
        off = difference([proved["after"]], [merged["after"]])
        limit = MERGED[case.config.quantization]
        row.record("merges", off <= limit, f"held-out loss differs by {off:.2%}, more than {limit:.1%}")
    return row


def compare(row: Row, name: str, other: list[float] | None, steps: int | None = None) -> None:
    """Record whether two rows have the same loss curve; with `steps`, its first so many."""
    if "losses" not in row.measured or other is None:
        row.checks[name] = None
        return
    off = difference(row.measured["losses"][:steps], other)
    row.record(name, off <= AGREE, f"losses differ by {off:.2%}, more than {AGREE:.0%}")
