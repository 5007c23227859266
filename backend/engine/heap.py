"""Freed memory goes back to the system once a piece of work is done: other engines and programs have use for it."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from core.allocator import TCMALLOC_SYMBOL


def give_back() -> None:
    """Return what is free in this process's heap, and in torch's own on a GPU, to the system.

    An allocator keeps what a run has freed for the next; a fine-tune leaves as much as its activations took.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _releaser()()


@cache
def _releaser() -> Callable[[], Any]:
    """Return the call of the allocator that this process has: tcmalloc's, glibc's, or none.

    Source: gperftools, malloc_extension_c.h; malloc_trim(3).
    """
    process = ctypes.CDLL(None)
    if hasattr(process, TCMALLOC_SYMBOL):
        return lambda: getattr(process, TCMALLOC_SYMBOL)()
    if hasattr(process, "malloc_trim"):
        return lambda: process.malloc_trim(ctypes.c_size_t(0))
    return lambda: None


# mallopt(3), malloc.h. Older releases of glibc refuse a threshold above 32 MiB.
_M_MMAP_THRESHOLD = -3
_PASSING_BYTES, _MOST_BYTES = 2**20, 32 * 2**20


@contextmanager
def passing() -> Iterator[None]:
    """Map each large block apart, so that it is the system's again as soon as it is freed.

    Steps of training are slower so: what one frees the next takes, and the kernel would clear it in between. Loading
    frees each block once. glibc's heap then keeps them, for torch's alignment lets the next not fit where the last was
    (docs/decisions/0011-the-engines-allocator.md). Other allocators stay as they are, and so does glibc's where no
    threshold was set at the start of this process: nothing tells what to go back to.
    """
    process = ctypes.CDLL(None)
    usual = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    if usual is None or not hasattr(process, "mallopt") or hasattr(process, TCMALLOC_SYMBOL):
        yield
        return
    process.mallopt(_M_MMAP_THRESHOLD, _PASSING_BYTES)
    try:
        yield
    finally:
        if not process.mallopt(_M_MMAP_THRESHOLD, int(usual)):
            process.mallopt(_M_MMAP_THRESHOLD, _MOST_BYTES)
