"""Errors in OpenAI's envelope, `{"error": {message, type, param, code}}`.

Source: openai-python 3.57, `_client.py` (statuses to exceptions) and `_base_client.py` (which are tried again).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "/v1"
# A chat can be asked again once there is room, once the base is free, or where it was unloaded in that moment.
_LATER = frozenset({"does-not-fit", "model-busy", "model-not-ready", "loaded-model-not-found"})
_LATER_S = 10
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {"unauthorized": "invalid_api_key"}
# The name of a field or a place in a list; a validator also names the member of a union that it tried.
_A_FIELD = re.compile(r"(?!literal\[|constrained-)[A-Za-z_0-9.\[\]-]+")
_SOURCES = ("body", "query", "path", "header")


@dataclass(frozen=True)
class OpenAIError:
    """An answer that is an error.

    Attributes:
        headers: What tells the SDK whether to try again.
    """

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def under_v1(path: str) -> bool:
    """Tell whether a path belongs to OpenAI's surface."""
    return path == PREFIX or path.startswith(PREFIX + "/")


def openai_error(path: str, slug: str, status: int, detail: str, extras: Mapping[str, Any]) -> OpenAIError:
    """Write an error as OpenAI's clients read it.

    The SDK tries 408, 409, 429 and 5xx again. What would fail again says `x-should-retry: false`, and a change of state
    that is not permitted is a 400.

    Args:
        path: What was asked for.
        slug: The kind of error under `/api`.
        status: Its status under `/api`.
        detail: For a person.
        extras: May hold `errors`, each with a location.
    """
    status, headers = _status(path, slug, status)
    error = {
        "message": detail,
        "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": _param(extras),
        "code": _CODES.get(slug, slug.replace("-", "_")),
    }
    return OpenAIError(status, {"error": error}, headers)


def _status(path: str, slug: str, status: int) -> tuple[int, dict[str, str]]:
    if slug in _LATER and path.endswith("/completions"):
        return 503, {"Retry-After": str(_LATER_S)}
    if status in (409, 422):
        return 400, {"x-should-retry": "false"}
    return status, {"x-should-retry": "false"} if status == 507 else {}


def _param(extras: Mapping[str, Any]) -> str | None:
    """Return the field that the first error is about."""
    errors = extras.get("errors") or [{}]
    location = [str(part) for part in errors[0].get("location", ()) if _A_FIELD.fullmatch(str(part))]
    return ".".join(location[1:] if location[:1] and location[0] in _SOURCES else location) or None
