"""Which rows are held out for validation."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


class NothingToHoldOut(ValueError):
    """All rows are the same, or there is only one."""


def row_content(row: dict[str, Any]) -> bytes:
    """Return what makes a normal row equal to another one."""
    return json.dumps(row, sort_keys=True).encode()


def held_out(rows: Iterable[bytes], fraction: float, seed: int) -> frozenset[int]:
    """Choose rows to hold out. Equal rows stay on one side, so no validation row is trained on.

    The choice depends on the rows' content, not on their order. An added row moves few others to the other side.

    Args:
        rows: The rows as bytes.
        fraction: How much to hold out, 0..1; at least one row, and never all.

    Returns:
        The positions of the held-out rows. They are at most `fraction` of all rows, unless equal rows force more.

    Raises:
        NothingToHoldOut: There are not two different rows.
    """
    groups: dict[bytes, list[int]] = {}
    count = 0
    for position, row in enumerate(rows):
        count = position + 1
        groups.setdefault(hashlib.sha256(b"%d:%b" % (seed, row)).digest(), []).append(position)
    if len(groups) < 2:
        raise NothingToHoldOut("all rows are the same: none can be held out for validation")
    size = max(1, round(fraction * count))
    chosen: list[int] = []
    for _, positions in sorted(groups.items())[:-1]:  # the last group is always trained on
        if len(chosen) + len(positions) <= size:
            chosen += positions
    smallest: list[int] = min(groups.values(), key=len)
    return frozenset(chosen or smallest)
