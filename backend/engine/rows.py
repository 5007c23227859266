"""Tokenized rows, and a store that holds many of them in little memory.

Shapes: T tokens a row. Labels are aligned with the inputs (label t is token t itself) and -100 where no loss is
computed; the trainer shifts.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One example, tokenized.

    Attributes:
        number: Its position in the dataset, from 0.
        ids: T token ids.
        labels: T labels.
        liked: Whether the answer is a good one, where rows are judged answers.
    """

    number: int
    ids: list[int]
    labels: list[int]
    truncated: bool
    liked: bool = True

    @property
    def trained_tokens(self) -> int:
        """Tokens with a loss; the first token of a row is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


class RowStore(Sequence[Row]):
    """Rows whose tokens are stored one after the other, in 8 bytes a token. Two Python lists take up to 48.

    It returns copies of its rows.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._ids, self._labels, self._ends = array("i"), array("i"), array("q", [0])
        self._numbers, self._truncated, self._liked = array("q"), array("b"), array("b")
        self.trained_tokens = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Add a row."""
        self._ids.extend(row.ids)
        self._labels.extend(row.labels)
        self._ends.append(len(self._ids))
        self._numbers.append(row.number)
        self._truncated.append(row.truncated)
        self._liked.append(row.liked)
        self.trained_tokens += row.trained_tokens

    @property
    def truncated(self) -> int:
        """How many rows are truncated."""
        return sum(self._truncated)

    def lengths(self) -> list[int]:
        """Return the tokens of each row."""
        return [high - low for low, high in pairwise(self._ends)]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, position: int) -> Row: ...
    @overload
    def __getitem__(self, position: slice) -> list[Row]: ...
    def __getitem__(self, position: int | slice) -> Row | list[Row]:
        if isinstance(position, slice):
            return [self[at] for at in range(*position.indices(len(self)))]
        at = range(len(self))[position]
        low, high = self._ends[at], self._ends[at + 1]
        ids, labels = self._ids[low:high].tolist(), self._labels[low:high].tolist()
        return Row(self._numbers[at], ids, labels, bool(self._truncated[at]), bool(self._liked[at]))

    def __iter__(self) -> Iterator[Row]:
        return (self[at] for at in range(len(self)))
