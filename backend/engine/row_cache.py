"""Keys and values of answers that go through a model together: a row each, all of them ending in the same column.

Legend: R rows, H heads of keys, T columns, D the size of a head.

The newest token of every row stands in the same column, and the rows begin where their lengths say. This is the form
of a batch with padding on the left, which every class of transformers takes for `generate`. A step writes one column.
What stands left of a row is never attended to, but it is multiplied by zero, so it has to be finite.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_GROWTH = 1.5  # of a block that is too small: copies add up to twice what is kept
_LEAST_COLUMNS = 128


class _Window:
    """The columns that are in use, shared by all layers: `start` to `end`, and the rows that are in use."""

    def __init__(self) -> None:
        self.start = self.end = self.rows = 0

    @property
    def width(self) -> int:
        return self.end - self.start


class _RowLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer of the model."""

    def __init__(self, window: _Window, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._window = window
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next column, R × H × 1 × D, and return all columns in use with it."""
        w = self._window
        if key_states.shape[0] != w.rows or key_states.shape[2] != 1:
            raise ValueError(f"{tuple(key_states.shape)} is not one column of {w.rows} rows")
        found = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[: w.rows, :, w.end : w.end + 1] = new
            found.append(kept[: w.rows, :, w.start : w.end + 1])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self._window.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns with the next ones, and no offset."""
        return self._window.width + query_length, 0


class RowCache:
    """The rows of one batch. It begins without any.

    Attributes:
        lengths: The tokens of each row.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._window = _Window()
        self._layers: list[_RowLayer] = []

    @property
    def cache(self) -> Cache:
        """What the model takes as `past_key_values`."""
        return Cache(layers=self._layers)

    @property
    def size_bytes(self) -> int:
        """Memory of the block."""
        return sum(kept.nbytes for layer in self._layers for kept in (layer.keys, layer.values))

    def add(self, states: Sequence[tuple[torch.Tensor, torch.Tensor]], most: int) -> None:
        """Add a row. If this fails, the cache is as it was.

        Args:
            states: Its keys and values so far, 1 × H × T × D each, of each layer.
            most: How many tokens a row of this cache may come to have.
        """
        length, row = states[0][0].shape[2], len(self.lengths)
        self._have_room(states, row + 1, length, most)
        w = self._window
        begin = w.end - length
        for layer, new in zip(self._layers, states, strict=True):
            for kept, state in zip((layer.keys, layer.values), new, strict=True):
                kept[:row, :, begin : w.start] = 0  # nothing has been written there, if the row is the longest
                kept[row, :, w.start : begin] = 0
                kept[row, :, begin : w.end] = state[0]
        self.lengths.append(length)
        self._settle()

    def remove(self, row: int) -> None:
        """Take a row out. The last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            w = self._window
            begin = w.end - self.lengths[last]
            for layer in self._layers:
                for kept in (layer.keys, layer.values):
                    kept[row, :, begin : w.end] = kept[last, :, begin : w.end]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if self.lengths:
            self._settle()
        else:
            self._layers, self._window = [], _Window()

    def prepare(self, most: int) -> None:
        """Have room for one more column.

        Args:
            most: How many tokens a row of this cache may come to have.
        """
        w = self._window
        if self._layers[0].keys.shape[2] <= w.end:
            self._move(self._layers[0].keys.shape[0], self._columns_for(w.width + 1, most), w.width)

    def wrote(self) -> None:
        """Note that the model has written a column."""
        self._window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """Return which columns each row attends to in the next pass, R × (T + 1); None where each attends to all."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        starts = torch.tensor([longest - length for length in self.lengths], device=device)
        return torch.arange(longest + 1, device=device)[None] >= starts[:, None]

    def positions(self, device: torch.device) -> torch.Tensor:
        """Return the position of each row's next token, R × 1."""
        return torch.tensor(self.lengths, device=device)[:, None]

    def _settle(self) -> None:
        w = self._window
        w.rows, w.start = len(self.lengths), w.end - max(self.lengths)

    def _have_room(
        self, states: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int, length: int, most: int
    ) -> None:
        width = max(self._window.width, length)
        if not self._layers:
            columns = self._columns_for(width + 1, most)
            self._layers = [
                _RowLayer(self._window, *(state.new_empty(_shape(state, 1, columns)) for state in both))
                for both in states
            ]
            self._window.start = self._window.end = width
            return
        had_rows, columns = self._layers[0].keys.shape[0], self._layers[0].keys.shape[2]
        if rows > had_rows or width + 1 > columns:
            wider = columns if width + 1 <= columns else self._columns_for(width + 1, most)
            self._move(2 * had_rows if rows > had_rows else had_rows, wider, width)
        elif self._window.end < length:
            self._move(had_rows, columns, width)

    def _columns_for(self, width: int, most: int) -> int:
        return max(width, min(most, max(_LEAST_COLUMNS, int(_GROWTH * width))))

    def _move(self, rows: int, columns: int, end: int) -> None:
        """Put what is kept into new tensors of this size, so that it ends in the column `end`."""
        w = self._window
        width = w.width

        def moved(kept: torch.Tensor) -> torch.Tensor:
            new = kept.new_empty(_shape(kept, rows, columns))
            new[: w.rows, :, end - width : end] = kept[: w.rows, :, w.start : w.end]
            return new

        # All before any: where the memory does not suffice, what is kept stays as it is.
        new = [(moved(layer.keys), moved(layer.values)) for layer in self._layers]
        for layer, (keys, values) in zip(self._layers, new, strict=True):
            layer.keys, layer.values = keys, values
        w.start, w.end = end - width, end


def _shape(state: torch.Tensor, rows: int, columns: int) -> tuple[int, ...]:
    return (rows, state.shape[1], columns, state.shape[3])
