"""JSON bodies are read once, strictly, before anything else sees them.

Python's parser takes NaN, doubled keys, UTF-16 and any depth; what follows would then answer 500, or act on
one of two values. Refused here: 400 for bytes that are not UTF-8, 413 for too many, 422 for the rest.
"""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem

MAX_JSON_BYTES = 4 * 2**20


class StrictJson:
    """ASGI middleware: parses a JSON body and hands on the same bytes, or refuses it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request whose body is sound JSON, or has another type; answer any other with a problem."""
        kind = Headers(scope=scope).get("content-type", "") if scope["type"] == "http" else ""
        if kind.partition(";")[0].strip().lower() != "application/json":
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return  # the client went away while it sent
        refusal = _refusal(scope["path"], body)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _read(receive: Receive) -> bytes | None:
    """Return the body, at most one chunk beyond the limit, or None if the client went away."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False) or sum(map(len, parts)) > MAX_JSON_BYTES:
            return b"".join(parts)


def _refusal(path: str, body: bytes) -> ASGIApp | None:
    if len(body) > MAX_JSON_BYTES:
        return problem(
            path, slug="too-large", title="Too large", status=413, detail=f"The limit is {MAX_JSON_BYTES} bytes."
        )
    if body == b"":
        return None
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        return _bad(path, 400, f"The body is not UTF-8 at byte {error.start}.")
    if text.startswith("\ufeff"):
        return _bad(path, 400, "The body begins with a byte-order mark.")
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # fails on half a surrogate pair
    except RecursionError:
        return _bad(path, 422, "The body is nested too deeply.")
    except UnicodeEncodeError:
        return _bad(path, 422, "The body holds half a surrogate pair.")
    except ValueError as error:
        return _bad(path, 422, f"The body is not JSON: {str(error)[:200]}")
    return None


def _bad(path: str, status: int, detail: str) -> ASGIApp:
    return problem(path, slug="invalid-json", title="Invalid JSON", status=status, detail=detail)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {doubled!r:.60} is there twice")
    return members


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
