"""How a page is made: templates that escape everything, headers that allow nothing foreign, errors as pages."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from api.guard import CSRF
from api.problems import status_of
from core.errors import StudioError
from core.singleton import singleton
from core.version import VERSION
from web import shown
from web.assets import get_assets

# Scripts and styles are files of ours: an injected one, or one that stands in the page, does not run.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# Addresses of the pages, in the order of the menu, with the key that follows `g` on the keyboard.
MENU = (
    ("/", "Home", "h"),
    ("/new", "New fine-tune", "n"),
    ("/runs", "Runs", "r"),
    ("/playground", "Playground", "p"),
    ("/datasets", "Datasets", "d"),
    ("/models", "Models", "m"),
    ("/adapters", "Adapters", "a"),
)


@singleton
def get_templates() -> Environment:
    """Return the templates. Every value that one shows is escaped; a name that is not given is an error."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= shown.FILTERS
    templates.globals |= {"asset": get_assets().url, "menu": MENU, "version": VERSION}
    return templates


def render(template: str, **values: Any) -> Markup:
    """Return a template as HTML."""
    return Markup(get_templates().get_template(template).render(**values))  # noqa: S704  escaped by the template


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Answer with a page, or with a part of one."""
    text = render(template, path=request.url.path, csrf=request.scope.get(CSRF), **values)
    return HTMLResponse(text, status, headers=_HEADERS)


class PageRoute(APIRoute):
    """Shows errors as pages, and as a part where a script asked for a part."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler of the route."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except StudioError as error:
                return _error(request, status_of(error), error.title, error.detail)
            except RequestValidationError as error:
                said = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors())
                return _error(request, 422, "Invalid request", said)

        return handle


def _error(request: Request, status: int, title: str, detail: str) -> HTMLResponse:
    partial = request.headers.get("hx-request") == "true"
    # htmx shows only what is answered with success.
    template, sent = ("part_error.html", 200) if partial else ("error.html", status)
    return page(request, template, sent, title=title, detail=detail)


def pages_router() -> APIRouter:
    """Return a router for pages: outside the OpenAPI document, with errors as pages."""
    return APIRouter(include_in_schema=False, route_class=PageRoute, default_response_class=HTMLResponse)
