"""How routes wait: for other threads without holding a thread, and for the Hub on separate threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from typing import Any, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.types import Receive

P = ParamSpec("P")
T = TypeVar("T")
_HUB_THREADS = 40  # as many as anyio has for everything else


async def until_done(future: "Future[Any]", timeout_s: float | None = None) -> None:
    """Wait until another thread has resolved a future, or the time is up. The caller looks at the future."""
    wrapped = asyncio.wrap_future(future)
    wrapped.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs it as unseen
    await asyncio.wait([wrapped], timeout=timeout_s)


async def until_done_or_gone(future: "Future[Any]", receive: Receive) -> bool:
    """Wait until another thread has resolved a future, or the client has hung up.

    A server tells a handler that answers with one document of a hang-up only if it asks.

    Args:
        receive: The request's, after its body was read.

    Returns:
        Whether the client is still there.
    """
    done, gone = asyncio.ensure_future(until_done(future)), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        return done.done()
    finally:
        done.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def may_ask_the_hub(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make a call that may wait for the Hub. It gets separate threads, so a Hub that hangs blocks no other request.

    The call sees the request's context, and with it the token.
    """
    return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=_hub_limiter())


@cache
def _hub_limiter() -> CapacityLimiter:
    return CapacityLimiter(_HUB_THREADS)
