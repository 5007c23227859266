"""/docs: the interactive document of the API, without another host."""

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse

from web.pages import page, pages_router

router = pages_router()


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Show Swagger UI."""
    return page(request, "docs.html")


@router.get("/redoc")
def redoc() -> RedirectResponse:
    """Lead to the one document that there is."""
    return RedirectResponse("/docs")
