"""Tensors that the processes of one run share: a file in memory that each of them maps."""

import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping

import torch

from engine.checkpoints import Tensors

_ALIGNMENT = 64  # bytes; a cache line, and more than any type needs


def memory_file() -> int:
    """Make an empty file that is in memory and has no name; return its descriptor.

    It does not count against the size of /dev/shm, which is 64 MiB in most containers.
    """
    if sys.platform == "linux":
        return os.memfd_create("peft-studio-gradients")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def bytes_for(tensors: Iterable[torch.Tensor]) -> int:
    """Return the size of a file that holds such tensors."""
    return sum(_padded(tensor) for tensor in tensors)


def _padded(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


class SharedTensors:
    """One value for each of a run's parameters, in memory that several processes see.

    Nothing here keeps two processes from writing at once. They take turns by their messages.

    Args:
        descriptor: Of a file of `bytes_for(like.values())` bytes.
        like: Gives names, shapes, types and their order, which is the same in every process.
    """

    def __init__(self, descriptor: int, like: Mapping[str, torch.Tensor]) -> None:
        memory = mmap.mmap(descriptor, bytes_for(like.values()))
        self._values: Tensors = {}
        at = 0
        for name, tensor in like.items():
            flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
            self._values[name] = flat.view(tensor.shape)
            at += _padded(tensor)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store values under their names; the other names keep theirs."""
        for name, tensor in tensors.items():
            self._values[name].copy_(tensor.detach())

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a value on the CPU; it changes when a process writes it."""
        return self._values[name]
