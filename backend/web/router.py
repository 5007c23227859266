"""All pages. One module each; a page that is new is named here, and in the menu if it has a place there."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute

from web import adapters, datasets, docs_page, home, login, models, new_run, playground, runs, static_files

_PAGES = (docs_page, home, login, new_run, runs, playground, datasets, models, adapters)
router = APIRouter()
for module in (static_files, *_PAGES):
    router.include_router(module.router)
router.include_router(new_run.posted)
router.include_router(login.posted)


def is_page(path: str) -> bool:
    """Tell whether a path is that of a page or of a part of one: what is shown, and changes nothing."""
    return any(
        isinstance(route, APIRoute) and route.response_class is HTMLResponse and route.path_regex.match(path)
        for module in _PAGES
        for route in module.router.routes
        if "GET" in (getattr(route, "methods", None) or ())
    )
