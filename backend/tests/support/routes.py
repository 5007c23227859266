"""Every route of the app: those of the OpenAPI document, the pages, and what serves their files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from core.settings import Settings
from main import create_app

_NAMED = re.compile(r"\{[a-z_]+(:path)?\}")


def every_route(app: FastAPI) -> list[tuple[str, str]]:
    """Return each method and path, with `x` in the place of every parameter."""
    found = {(method, _NAMED.sub("x", route.path)) for route in _walk(app.routes) for method in route.methods}
    assert ("POST", "/v1/chat/completions") in found and ("GET", "/") in found
    return sorted(found)


def _walk(routes: Any) -> Iterator[Any]:
    """Yield the routes, those of included routers too, which FastAPI keeps as they were included."""
    for route in routes:
        if hasattr(route, "effective_candidates"):
            yield from _walk(route.effective_candidates())
        elif getattr(route, "methods", None):
            yield route


def new_app(home: Path) -> FastAPI:
    """Return an app that is not started, to be asked for its routes."""
    return create_app(Settings(home=home))
