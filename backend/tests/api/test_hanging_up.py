"""Whoever hangs up on an answer ends it, and the engine is free for the next."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from core.settings import Settings
from domain import protocol
from domain.results import Generated
from main import create_app
from services.generation_service import Generation, get_generation_service
from tests.support.rows import messages_jsonl
from tests.support.server import CACHE, StudioServer, start_server, wait_until
from tests.support.shapes import give_positions
from tests.support.tiny_model import TINY_ID, copy_tiny_model

MOST = 32768
ANSWER = Generated(
    text="x", prompt_tokens=1, completion_tokens=1, finish_reason="stop", elapsed_s=0.1, chat_template=None
)


class Engine:
    """Generates until it is told to stop."""

    def __init__(self) -> None:
        self.future: Future[Generated] = Future()
        self.stopped: list[str] = []

    def stop(self, request_id: str) -> None:
        self.stopped.append(request_id)


class Generator:
    """Starts one generation, and tells when."""

    def __init__(self, engine: Engine, on_start: Callable[[], object]) -> None:
        self._engine, self._on_start = engine, on_start

    def start(self, _model_id: str, command: protocol.Generate, _on_text: Any = None) -> Generation:
        self._on_start()
        return Generation(self._engine, command, self._engine.future)  # type: ignore[arg-type]


async def ask(engine: Engine, on_start: Callable[[], object], gone: asyncio.Event, *, stream: bool) -> list[Message]:
    """Send a request that hangs up once `gone` is set; return what came back."""
    app = create_app(Settings())
    app.dependency_overrides[get_generation_service] = lambda: Generator(engine, on_start)
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    path = "/api/peft/loaded-models/lm_1/generate"
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 60)
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("early", [False, True], ids=["under way", "before it begins"])
def test_the_engine_is_told_to_stop(stream: bool, early: bool) -> None:
    engine = Engine()

    async def scenario() -> None:
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        if early:
            gone.set()
        await ask(engine, lambda: loop.call_soon_threadsafe(gone.set), gone, stream=stream)

    asyncio.run(scenario())
    assert len(engine.stopped) == 1 and not engine.future.done()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_waited_for_is_not_stopped(stream: bool) -> None:
    engine = Engine()

    async def scenario() -> list[Message]:
        return await ask(engine, lambda: engine.future.set_result(ANSWER), asyncio.Event(), stream=stream)

    sent = asyncio.run(scenario())
    assert sent[0]["status"] == 200 and b'"text"' in b"".join(message.get("body", b"") for message in sent)
    assert engine.stopped == []


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """A server with a model that never ends an answer by itself."""
    models = tmp_path_factory.mktemp("models")
    copy_tiny_model(models / TINY_ID)
    change(models / TINY_ID / "tokenizer_config.json", "eos_token", "pad_token")
    for name in ("config.json", "generation_config.json"):
        change(models / TINY_ID / name, "eos_token_id", "pad_token_id")
    give_positions(models / TINY_ID, 2 * MOST, CACHE)
    (models / TINY_ID / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    with start_server(tmp_path_factory.mktemp("home"), models) as server:
        yield server


def change(path: Path, *gone: str) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in gone}))


def hang_up(studio: StudioServer, loaded_id: str) -> None:
    """Ask for as long an answer as there is, see that the engine computes it, and close the connection."""
    body = json.dumps({"prompt": "say", "max_new_tokens": MOST, "temperature": 0}).encode()
    used_s = studio.engine().cpu_times().user
    with socket.create_connection(("127.0.0.1", studio.port)) as client:
        client.sendall(
            f"POST /api/peft/loaded-models/{loaded_id}/generate HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_until(lambda: studio.engine().cpu_times().user > used_s + 0.3)


def seen(studio: StudioServer) -> int:
    return studio.log_path.read_text().count("status=499")


@pytest.mark.engine
def test_the_next_answer_and_a_job_do_not_wait_for_one_that_nobody_reads(studio: StudioServer) -> None:
    loaded = studio.load(TINY_ID)
    hang_up(studio, loaded["id"])
    wait_until(lambda: seen(studio) == 1)
    body = {"prompt": "say", "max_new_tokens": 2, "temperature": 0}
    answer = studio.http.post(f"/api/peft/loaded-models/{loaded['id']}/generate", json=body)
    assert answer.status_code == 200 and answer.json()["finish_reason"] == "length", answer.text

    hang_up(studio, loaded["id"])
    dataset = studio.upload(messages_jsonl())
    job = studio.submit(loaded_model_id=loaded["id"], dataset_id=dataset["id"], overrides={"max_steps": 1})
    assert studio.wait_for_state(job["id"], "succeeded", "failed")["state"] == "succeeded"
    assert seen(studio) == 2
