"""Freed memory goes back to the system once a piece of work is done: other engines and programs have use for it."""

import ctypes
import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


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
    if hasattr(process, "MallocExtension_ReleaseFreeMemory"):
        return lambda: process.MallocExtension_ReleaseFreeMemory()
    if hasattr(process, "malloc_trim"):
        return lambda: process.malloc_trim(ctypes.c_size_t(0))
    return lambda: None
