"""The unmodified `openai` package as a client of the server under test."""

import json
from typing import Any

from openai import AsyncOpenAI, OpenAI

from tests.support.server import StudioServer


def client_of(studio: StudioServer, **options: Any) -> OpenAI:
    """Return a client as a script makes one: with the server's address, and a key that nothing asks for."""
    return OpenAI(base_url=f"http://127.0.0.1:{studio.port}/v1", api_key="not-needed", **options)


def async_client_of(studio: StudioServer, **options: Any) -> AsyncOpenAI:
    """Return the same for `async` code."""
    return AsyncOpenAI(base_url=f"http://127.0.0.1:{studio.port}/v1", api_key="not-needed", **options)


def jsonl(*rows: dict[str, Any]) -> bytes:
    """Return rows as a file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
