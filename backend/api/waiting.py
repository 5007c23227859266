"""How routes wait: for other threads without holding a thread, and for the Hub on separate threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from typing import Any, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

P = ParamSpec("P")
T = TypeVar("T")
_HUB_THREADS = 40  # as many as anyio has for everything else


async def until_done(future: "Future[Any]", timeout_s: float | None = None) -> None:
    """Wait until another thread has resolved a future, or the time is up. The caller looks at the future."""
    wrapped = asyncio.wrap_future(future)
    wrapped.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs it as unseen
    await asyncio.wait([wrapped], timeout=timeout_s)


async def may_ask_the_hub(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make a call that may wait for the Hub. It gets separate threads, so a Hub that hangs blocks no other request.

    The call sees the request's context, and with it the token.
    """
    return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=_hub_limiter())


@cache
def _hub_limiter() -> CapacityLimiter:
    return CapacityLimiter(_HUB_THREADS)
