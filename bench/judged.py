"""The points that an estimate is judged by: their errors, and least squares for constants. Sizes are in bytes."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIB = 2**20


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
    """Return the coefficients of at least 0 with the smallest squares of relative errors, over all feature subsets."""
    left, right = features / peaks[:, None], wanted / peaks
    best, coefficients = np.inf, np.zeros(features.shape[1])
    for size in range(1, features.shape[1] + 1):
        for columns in itertools.combinations(range(features.shape[1]), size):
            part, *_ = np.linalg.lstsq(left[:, columns], right, rcond=None)
            rest = float(((left[:, columns] @ part - right) ** 2).sum())
            if (part >= 0).all() and rest < best:
                best, coefficients = rest, np.zeros(features.shape[1])
                coefficients[list(columns)] = part
    return coefficients


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


def table(points: Sequence[Judged]) -> list[str]:
    """Write points as a table in MiB."""
    lines = ["| point | predicted MiB | measured MiB | error | |", "|---|---:|---:|---:|---|"]
    for point in points:
        sizes = f"{point.predicted / MIB:,.0f} | {point.measured / MIB:,.0f}"
        lines.append(f"| {point.name} | {sizes} | {point.error:+.1%} | {'fitted on' if point.fitted else ''} |")
    return lines


def summary(groups: Mapping[str, Sequence[Judged]]) -> list[str]:
    """Write the figures of several sets as a table."""
    rows = {name: figures(points) for name, points in groups.items() if points}
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return lines + [f"| {name} | " + " | ".join(values.values()) + " |" for name, values in rows.items()]


def halves(points: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Return the points that were fitted on, and the others."""
    return [point for point in points if point.fitted], [point for point in points if not point.fitted]
