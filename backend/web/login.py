"""/login: where an API key is set, the pages ask for it once and keep a login in a cookie that no script can read."""

import re
from functools import lru_cache
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from pydantic import Field

from api.peft_schemas import Request as Body
from api.problems import problem
from api.sessions import LASTS_S, Sessions
from core.settings import Settings, get_settings
from web.pages import page, pages_router

router = pages_router()
posted = APIRouter(include_in_schema=False)
_LOCAL = re.compile(r"/(?![/\\])")  # a path of this server: "//host" would lead elsewhere
_Settings = Annotated[Settings, Depends(get_settings)]


class Login(Body):
    """The key that a person typed."""

    key: str = Field(min_length=1, max_length=1000)


@lru_cache(maxsize=4)
def _sessions(key: bytes, port: int) -> Sessions:
    return Sessions(key, port)


def _sessions_of(settings: Settings) -> Sessions | None:
    return None if settings.api_key is None else _sessions(settings.api_key.get_secret_value().encode(), settings.port)


@router.get("/login")
def login(
    request: Request,
    settings: _Settings,
    next: Annotated[str, Query(max_length=4000)] = "/",
    again: bool = False,
) -> Response:
    """Ask for the key; who is logged in, or needs no key, goes on.

    A browser that follows a link of another site sends no SameSite cookie. The page then leads to itself once: that is
    a request of this site, with the cookie if there is one.
    """
    to = next if _LOCAL.match(next) else "/"
    sessions = _sessions_of(settings)
    if sessions is None or sessions.token_of(request.cookies.get(sessions.cookie_name, "")) is not None:
        return RedirectResponse(to, 303, headers={"Cache-Control": "no-store"})
    is_led_here = request.headers.get("sec-fetch-site") == "cross-site" and not again
    answer: HTMLResponse = page(request, "login_again.html" if is_led_here else "login.html", next=to)
    return answer


@posted.post("/login")
def begin(request: Request, body: Login, settings: _Settings) -> Response:
    """Begin a login, or refuse another key."""
    sessions = _sessions_of(settings)
    if sessions is None or not sessions.is_key(body.key):
        return problem("/login", slug="wrong-key", title="Wrong key", status=401, detail="This is not the API key.")
    answer = JSONResponse({})
    answer.set_cookie(
        sessions.cookie_name,
        sessions.begin(),
        max_age=LASTS_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@posted.post("/logout")
def end(settings: _Settings) -> Response:
    """End the login in this browser."""
    answer = JSONResponse({})
    sessions = _sessions_of(settings)
    if sessions is not None:
        answer.delete_cookie(sessions.cookie_name, httponly=True, samesite="strict")
    return answer
