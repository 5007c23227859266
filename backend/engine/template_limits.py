"""Limits on a chat template, which is a program of a stranger's: time, memory, and the size of numbers.

The sandbox that transformers renders templates in keeps them from Python's objects. It stops neither loops nor what
takes all memory.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import mul
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from engine.errors import BadModel
from engine.time_limit import cpu_limit

_LIMIT_S = 2.0  # the longest template takes a thousandth of that
_MOST_MORE_BYTES = 256 * 2**20  # beside what the engine holds; a conversation of a million tokens takes some 4 MB
_MOST_BITS = 10_000  # of a number; a product of longer ones is one step in C, which no signal ends
_FRESH_S = 0.002  # reading how much is held takes 20 us, which a renderer of many rows need not pay for each
_NEVER = (float("-inf"), 0)
_held: tuple[float, int] = _NEVER
_overran = False  # whether the last template was ended by a limit


@contextmanager
def template_limits() -> Iterator[None]:
    """Let the block take so much processor time and so much more memory.

    Raises:
        BadModel: It took too long, or too much.
    """
    global _overran, _held
    if _overran:  # what that template took is free by now, and would be counted as the engine's own
        from engine.heap import give_back

        give_back()
        _overran, _held = False, _NEVER
    try:
        with _memory_limit(), cpu_limit(_LIMIT_S, "the chat template does not come to an end"):
            yield
    except MemoryError as error:
        _overran = True
        raise BadModel("the chat template takes too much memory") from error
    except BadModel:
        _overran = True
        raise


def bound_numbers() -> None:
    """Have every sandbox of this process refuse products and powers that would never be done."""
    operators = SandboxedEnvironment.default_binop_table
    operators["*"], operators["**"] = _bounded(mul, _bits_of_product), _bounded(pow, _bits_of_power)
    SandboxedEnvironment.intercepted_binops = frozenset({"*", "**"})


def _bounded(operator: Callable[[Any, Any], Any], bits: Callable[[int, int], int]) -> Callable[[Any, Any], Any]:
    def operate(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and bits(left, right) > _MOST_BITS:
            raise SecurityError(f"a number of more than {_MOST_BITS} bits")
        return operator(left, right)

    return operate


def _bits_of_product(left: int, right: int) -> int:
    return left.bit_length() + right.bit_length()


def _bits_of_power(left: int, right: int) -> int:
    return left.bit_length() * max(right, 1)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Limit what this process maps from now on (Linux alone counts it). Its other threads map little meanwhile."""
    if sys.platform != "linux":
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + _MOST_MORE_BYTES
    if before != resource.RLIM_INFINITY:
        limit = min(limit, before)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def _data_bytes() -> int:
    """Return what this process has mapped for itself. Source: proc(5), /proc/pid/statm, the sixth field."""
    global _held
    now_s = time.monotonic()
    if now_s - _held[0] > _FRESH_S:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - half the time of pathlib's
            _held = now_s, int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    return _held[1]
