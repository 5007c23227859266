"""The one place where errors become HTTP: RFC 9457 problem documents, and under /v1 OpenAI's envelope.

Request bodies are never echoed.
"""

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from core import errors
from core.logging import get_logger
from domain.openai.errors import openai_error, under_v1

_RETRY_AFTER_S = 30  # where nothing says how long the service will be unavailable
_log = get_logger(__name__)

STATUS: dict[type[errors.StudioError], int] = {
    errors.NotFound: 404,
    errors.Rejected: 422,
    errors.TooLarge: 413,
    errors.Conflict: 409,
    errors.AccessDenied: 403,
    errors.Unavailable: 503,
    errors.EngineFailed: 502,
    errors.StorageFull: 507,
    errors.StudioError: 500,
}


class Problem(BaseModel):
    """An error (RFC 9457). `type` is stable; `detail` is for a person; more members may follow."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Which kind of problem: /problems/<slug>.")
    title: str = Field(description="The kind in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong with this request, and what to do.")
    instance: str = Field(description="The path that was asked for.")


def status_of(error: errors.StudioError) -> int:
    """Return the status of the nearest ancestor that has one."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def problem(
    request_path: str,
    *,
    slug: str,
    title: str,
    status: int,
    detail: str,
    extras: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Make a problem response; under /v1 it has OpenAI's form."""
    if under_v1(request_path):
        said = openai_error(request_path, slug, status, detail, extras or {})
        return JSONResponse(said.body, said.status, headers={**(headers or {}), **said.headers})
    body = {
        **(extras or {}),
        "type": f"/problems/{slug}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": request_path,
    }
    return JSONResponse(body, status, headers=headers, media_type="application/problem+json")


def _studio_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, errors.StudioError):
        raise error
    status = status_of(error)
    retry = error.extras.get("retry_after_s", _RETRY_AFTER_S if status == 503 else None)
    headers = {"Retry-After": str(math.ceil(retry))} if retry is not None else None
    if status >= 500:
        _log.warning("request.failed", slug=error.slug, detail=error.detail)
    return problem(
        request.url.path,
        slug=error.slug,
        title=error.title,
        status=status,
        detail=error.detail,
        extras=error.extras,
        headers=headers,
    )


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    field_errors = [
        {"location": [str(part) for part in item["loc"]], "message": item["msg"], "type": item["type"]}
        for item in error.errors()
    ]
    detail = "; ".join(f"{'.'.join(item['location'])}: {item['message']}" for item in field_errors)
    return problem(
        request.url.path,
        slug="invalid-request",
        title="Invalid request",
        status=422,
        detail=detail,
        extras={"errors": field_errors},
    )


def _http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    words = str(error.detail)
    return problem(
        request.url.path,
        slug=words.lower().replace(" ", "-")[:60],
        title=words,
        status=error.status_code,
        detail=f"{words}: {request.method} {request.url.path}",
        headers=dict(error.headers) if error.headers else None,
    )


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    _log.error("request.crashed", path=request.url.path, exc_info=error)
    return problem(
        request.url.path,
        slug="internal",
        title="Internal error",
        status=500,
        detail="The server failed; its log says why under this request's id.",
    )


def install(app: FastAPI) -> None:
    """Make every error of the app a problem document."""
    app.add_exception_handler(errors.StudioError, _studio_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    describe = app.openapi

    def document() -> dict[str, Any]:
        described = describe()
        _name_media_type(described)
        return described

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way of changing the document


def _name_media_type(document: dict[str, Any]) -> None:
    """Write the media type of problems into the document; FastAPI writes that of every other answer."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            content = operation["responses"].get("default", {}).get("content", {})
            if not under_v1(path) and "application/json" in content:
                content["application/problem+json"] = content.pop("application/json")
