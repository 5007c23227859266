"""Whoever waits, for the Hub or for another thread, holds up nobody else."""

import asyncio
import gc
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from api.waiting import until_done
from tests.support.hub_double import HubDouble
from tests.support.server import start_server, wait_until
from tests.support.shapes import keep_shape

THREADS = 40  # for the routes that ask the Hub, and as many for all others


def _questions(number: int) -> tuple[str, str, dict[str, Any] | None]:
    """Return a request that has to ask the Hub: each number another one, all such routes in turn."""
    name = f"me/{number}"
    return (
        ("GET", f"/api/models/{name}", None),
        ("POST", "/api/models/search", {"query": name}),
        ("GET", f"/api/models/popular/text-generation?limit={number + 1}", None),
        ("POST", "/api/models/compatibility", {"model_id": name, "algorithm": "lora"}),
        ("POST", "/api/peft/configure", {"model_id": name, "algorithm": "lora"}),
        ("POST", "/api/peft/load-model", {"model_id": name}),
        ("POST", "/api/datasets", {"hub_id": name}),
    )[number % 7]


def test_a_hub_that_hangs_holds_up_only_those_that_ask_it(tmp_path: Path, tiny_path: Path) -> None:
    with HubDouble() as hub, ThreadPoolExecutor(THREADS) as clients:
        environment = {
            **{"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")},
            "PEFT_STUDIO_CACHE_DIR": str(tmp_path / "cache"),
        }
        keep_shape(tmp_path / "cache", json.loads((tiny_path / "config.json").read_text()))
        with start_server(tmp_path / "home", tiny_path.parents[1], **environment) as studio:
            for route in ("info", "list"):
                hub.fail(route, "hang", times=1000)
            asked = [
                clients.submit(studio.http.request, method, path, json=body)
                for method, path, body in map(_questions, range(THREADS))
            ]
            wait_until(lambda: hub.requests["info"] + hub.requests["list"] >= THREADS)
            for path in ("/api/models/local", "/api/training/jobs", "/api/peft/loaded-models", "/health"):
                assert studio.http.get(path, timeout=600).status_code == 200
            assert not any(question.done() for question in asked)
            hub.recover()
            hub.release()
            assert {question.result().status_code for question in asked} == {200, 404}


def _run(check: Any) -> list[dict[str, Any]]:
    """Run a coroutine where there is one thread for blocking calls; return what asyncio had to complain about."""
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        await check()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main())
    return complaints


def test_waiting_for_other_threads_holds_none() -> None:
    async def check() -> None:
        futures: list[Future[int]] = [Future() for _ in range(8)]
        waiting = [asyncio.create_task(until_done(future)) for future in futures]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(threading.active_count), 30)
        assert not any(task.done() for task in waiting)
        for future in futures:
            await asyncio.to_thread(future.set_result, 1)
        await asyncio.wait_for(asyncio.gather(*waiting), 30)

    assert _run(check) == []


@pytest.mark.parametrize("failed", [False, True])
def test_a_wait_that_ends_early_leaves_the_future_to_whoever_resolves_it(failed: bool) -> None:
    async def check() -> None:
        future: Future[int] = Future()
        await until_done(future, 0.001)
        waiting = asyncio.create_task(until_done(future))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not future.cancelled() and not future.done()
        if failed:
            future.set_exception(ValueError("as told"))
        else:
            future.set_result(1)
        await until_done(future)

    assert _run(check) == []
