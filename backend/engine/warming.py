"""What an engine does before it is wanted: every import, and nothing that takes memory of a GPU."""

import ctypes
import gc
import sys

from domain.results import WarmedUp


def warm_up() -> WarmedUp:
    """Import what loads, runs and answers need. Nothing is computed, and no random number is drawn."""
    import engine.answering
    import engine.generation
    import engine.outline
    import engine.training  # noqa: F401

    gc.collect()
    gc.freeze()  # as at the end of the imports in engine/__main__.py
    return WarmedUp(gpu_contexts=held_contexts())


def held_contexts(driver: ctypes.CDLL | None = None) -> int:
    """Return on how many GPUs this process holds a primary CUDA context. Asking makes none.

    Args:
        driver: The CUDA driver's library; the system's by default.

    Source: CUDA driver API, cuDevicePrimaryCtxGetState.
    """
    cuda = driver if driver is not None else _driver()
    if cuda is None:
        return 0
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0  # nothing has initialised the driver in this process, so there is no context
    held = 0
    for ordinal in range(count.value):
        device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
        known = cuda.cuDeviceGet(ctypes.byref(device), ordinal) == 0
        if known and cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0:
            held += active.value != 0
    return held


def _driver() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
