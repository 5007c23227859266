"""Follows the storages that operators make, from when they are made until nothing holds them."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """Counts the bytes that are held of what operators made within, forward and backward, with data or without.

    What a kernel takes for itself alone is not seen. Views and results written in place are no new storages.

    Attributes:
        held: Bytes that are held now.
        moments: Bytes that were held after each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.moments: list[int] = []
        self._numbers: dict[int, int] = {}  # of the storages that live, by their places in memory
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator of torch."""
        if func is torch.ops.prim.device.default:  # a fake tensor is asked for its device on every occasion
            return func(*args, **(kwargs or {}))
        for value in _tensors((*args, *kwargs.values()) if kwargs else args):
            self._number(value.untyped_storage(), made_within=False)
        made = func(*args, **(kwargs or {}))
        for value in _tensors(made if isinstance(made, tuple | list) else (made,)):
            self._number(value.untyped_storage(), made_within=True)
        self.moments.append(self.held)
        return made

    def number(self, tensor: torch.Tensor) -> int:
        """Return a number that no other storage of this trace has or had."""
        return self._number(tensor.untyped_storage(), made_within=False)

    def _number(self, storage: torch.UntypedStorage, *, made_within: bool) -> int:
        place = storage._cdata
        if place not in self._numbers:
            self._numbers[place] = self._next
            self._next += 1
            size = storage.nbytes() if made_within else 0
            self.held += size
            weakref.finalize(storage, self._freed, place, size).atexit = False
        return self._numbers[place]

    def _freed(self, place: int, size: int) -> None:
        del self._numbers[place]
        self.held -= size


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield what are tensors of an operator's arguments or results, those in lists as well."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
