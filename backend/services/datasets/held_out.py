"""The rows of a dataset that a job holds out for validation: the engine's choice, made again."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from domain.datasets.split import held_out, row_content

_KEPT = 64  # choices; each reads the whole dataset


@lru_cache(maxsize=_KEPT)
def held_out_rows(path: Path, fraction: float, seed: int) -> tuple[int, ...]:
    """Return the positions of the rows that are held out, in order.

    Args:
        path: The file of a dataset's normal rows, which never changes.
        fraction: The job's validation_fraction, above 0.
        seed: The job's.

    Raises:
        NothingToHoldOut: There are not two different rows; such a job was refused.
    """
    with path.open("rb") as file:
        return tuple(sorted(held_out((row_content(json.loads(line)) for line in file), fraction, seed)))


def rows_at(path: Path, positions: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the rows at some positions, in order of the file."""
    if not positions:
        return []
    wanted, found = frozenset(positions), list[dict[str, Any]]()
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number in wanted:
                found.append(json.loads(line))
            if len(found) == len(wanted):
                break
    return found
