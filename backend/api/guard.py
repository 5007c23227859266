"""What every request passes: an id, who may ask (Host, Origin, key), and a line in the log."""

import hmac
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem
from api.sessions import Sessions
from api.strict_json import MAX_JSON_BYTES
from core import telemetry
from core.logging import get_logger
from core.settings import Settings, is_loopback

_log = get_logger("api.requests")
_OPEN_PATHS = frozenset({"/health", "/login"})
_OPEN_FOLDER = "/static/"  # scripts and styles, the same for everybody
_SAFE = frozenset({"GET", "HEAD"})
_RETRY_AFTER_S = 1  # a request that is no stream takes less, and a stream's place is free once it ends
# What a browser may make of an answer that does not say so itself: nothing but what its type says, in no page but ours.
_FOR_BROWSERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
CSRF = "peft_studio.csrf"  # where a request's scope holds the token of its login
# RFC 9110's host and optional port; urlsplit alone would read "[::1]evil" as ::1.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Guard:
    """ASGI middleware that answers only those who may ask.

    A web page the user visits must not be able to drive a server on loopback, so the Host must be ours and a foreign
    Origin is refused, whatever the method. A link of another site may lead to a page for people, and to nothing else.

    Args:
        app: Answers those who may ask.
        is_page: Tells whether a path is a page's.
    """

    def __init__(self, app: ASGIApp, settings: Settings, is_page: Callable[[str], bool] = lambda _: False) -> None:
        self._app, self._is_page = app, is_page
        self._settings = settings
        self._hosts = frozenset({settings.host.lower(), *(host.lower() for host in settings.allowed_hosts)})
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key is not None else None
        self._under_way: Counter[str] = Counter()  # requests of each client's address
        self._sessions = Sessions(self._key, settings.port) if self._key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it as a problem document; each gets an id and a line in the log."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"The server speaks HTTP alone, and was asked for {scope['type']}.")
        request_id = uuid.uuid4().hex[:16]
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_s = time.monotonic() - started
                route = getattr(scope.get("route"), "path", "unmatched")
                telemetry.http_request_seconds.labels(scope["method"], route, status).observe(elapsed_s)
                sent = {name.lower() for name, _ in message["headers"]}
                added = [header for header in _FOR_BROWSERS if header[0] not in sent]
                added.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            client = (scope.get("client") or ("", 0))[0]
            self._under_way[client] += 1
            try:
                refusal = self._refusal(scope) or self._crowd_refusal(scope, client)
                await (refusal or self._app)(scope, receive, send_with_id)
            finally:
                self._under_way[client] -= 1
                if not self._under_way[client]:
                    del self._under_way[client]
            _log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                elapsed_ms=round((time.monotonic() - started) * 1000, 1),
            )

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if len(headers.getlist("host")) != 1 or not self._is_ours(headers["host"]):
            return problem(
                path, slug="wrong-host", title="Wrong host", status=421, detail="The Host is not this server."
            )
        origin = headers.get("origin")
        if (origin is not None and not self._may_call(origin, headers["host"])) or (
            origin is None and headers.get("sec-fetch-site") == "cross-site" and not self._is_visit(scope, headers)
        ):
            return problem(
                path,
                slug="foreign-origin",
                title="Foreign origin",
                status=403,
                detail="Pages of this origin may not call the server; see PEFT_STUDIO_CORS_ORIGINS.",
            )
        return self._key_refusal(scope, headers) or self._body_refusal(scope, headers)

    def _crowd_refusal(self, scope: Scope, client: str) -> ASGIApp | None:
        limit = self._settings.max_requests_per_client
        if self._under_way[client] <= limit or scope["path"] == "/health":
            return None
        return problem(
            scope["path"],
            slug="too-many-requests",
            title="Too many requests",
            status=429,
            detail=f"{limit} requests of this address are under way; see PEFT_STUDIO_MAX_REQUESTS_PER_CLIENT.",
            headers={"Retry-After": str(_RETRY_AFTER_S)},
        )

    def _key_refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        path = scope["path"]
        is_open = path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER) or scope["method"] == "OPTIONS"
        if self._key is None or is_open:
            return None
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), self._key):
            return None
        if "authorization" not in headers and (token := self._login(headers)) is not None:
            scope[CSRF] = token
            if scope["method"] in _SAFE or hmac.compare_digest(
                headers.get("x-csrf-token", "").encode(), token.encode()
            ):
                return None
            return problem(
                path,
                slug="no-csrf-token",
                title="No CSRF token",
                status=403,
                detail="A request under a login of the pages needs their token as X-CSRF-Token; load the page again.",
            )
        if scope["method"] in _SAFE and "text/html" in headers.get("accept", ""):
            query = scope.get("query_string", b"").decode("latin-1")
            address = quote(f"{path}?{query}" if query else path)
            return RedirectResponse(f"/login?next={address}", 303, headers={"Cache-Control": "no-store"})
        return problem(
            path,
            slug="unauthorized",
            title="Unauthorized",
            status=401,
            detail="Send the API key as 'Authorization: Bearer <key>'.",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _login(self, headers: Headers) -> str | None:
        """Return the token of the login whose cookie came with a request, or None."""
        if self._sessions is None:
            return None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._sessions.cookie_name)
        except CookieError:
            return None
        return self._sessions.token_of(cookie.value) if cookie is not None else None

    def _body_refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        path, length = scope["path"], headers.get("content-length", "0")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not length.isdigit():
            return problem(
                path, slug="bad-length", title="Bad length", status=400, detail="Content-Length is no number."
            )
        multipart = kind == "multipart/form-data"
        if multipart and int(length) > self._settings.max_upload_bytes + MAX_JSON_BYTES:
            limit = self._settings.max_upload_bytes
            return problem(path, slug="too-large", title="Too large", status=413, detail=f"The limit is {limit} bytes.")
        if not multipart and int(length) > MAX_JSON_BYTES:
            return problem(
                path,
                slug="too-large",
                title="Too large",
                status=413,
                detail=f"The limit is {MAX_JSON_BYTES} bytes.",
            )
        has_body = int(length) > 0 or "transfer-encoding" in headers
        if has_body and kind not in ("application/json", "multipart/form-data"):
            return problem(
                path,
                slug="unsupported-media-type",
                title="Unsupported media type",
                status=415,
                detail="Send application/json (or multipart/form-data to upload a dataset).",
            )
        return None

    def _is_visit(self, scope: Scope, headers: Headers) -> bool:
        """Tell whether a person follows a link to a page, which then fills the tab: the other site reads none of it."""
        return (
            scope["method"] in _SAFE
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
            and self._is_page(scope["path"])
        )

    def _is_ours(self, host: str) -> bool:
        matched = _HOST.fullmatch(host)
        name = matched.group(1).strip("[]").lower() if matched is not None else None
        return name is not None and (name in self._hosts or is_loopback(name))

    def _may_call(self, origin: str, host: str) -> bool:
        return origin in self._settings.cors_origins or origin in (f"http://{host}", f"https://{host}")
