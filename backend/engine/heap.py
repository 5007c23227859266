"""Returns freed memory to the system after a piece of work, for other engines and programs."""

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
    """Return the free memory of this process's heap, and of torch's on a GPU, to the system.

    An allocator keeps freed memory for the next run. After a fine-tune that is as much as its activations took.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _releaser()()


@cache
def _releaser() -> Callable[[], Any]:
    """Return the call of this process's allocator that gives memory back: tcmalloc's, glibc's, or none.

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
    """Map each large block by itself during the block, so that the system has it back as soon as it is freed.

    This suits loading, which frees each block once. In glibc's heap the freed blocks would stay, since with torch's
    alignment the next block does not fit in the place of the last (docs/decisions/0011-the-engines-allocator.md).
    Training would be slower with it: a step takes what the last one freed, and the kernel would clear it in between.

    Other allocators are not changed. glibc's is not changed either if no threshold was set at the start of this
    process, since it could not be restored.
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
