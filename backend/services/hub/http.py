"""HTTP requests to the Hub: session, headers, token, pauses that the Hub asks for, and a bounded number of attempts.

Requests go through huggingface_hub's session, headers and error classes, so that HF_TOKEN, proxies and
HF_HUB_OFFLINE mean what they mean everywhere.
"""

import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import from_json

from core import errors, telemetry
from core.clock import Clock, SystemClock
from core.logging import get_logger
from core.singleton import singleton
from core.version import VERSION
from domain.hub.repos import Repo
from services.hub.errors import map_hub_error, may_pass, told_wait_s, unavailable

if TYPE_CHECKING:
    import httpx

R = TypeVar("R")
Params = list[tuple[str, str | int | float | bool | None]]
Wait = Callable[[float], None]
# The token of the request that is being answered. A ContextVar carries it to the HTTP call through every layer, so that
# it stands in no signature, record or log line.
request_token: ContextVar[str | None] = ContextVar("request_token", default=None)
_ATTEMPTS = 3
_IMPATIENT_S = 4.0  # where a client gets an answer without the Hub's
_MAX_WAIT_S = 10.0  # a client waits meanwhile; it is told of a longer pause instead
_MAX_BODY_BYTES = 32 * 2**20  # 100 models expanded are 1-2 MB, the largest tokenizer_config.json some 10 MB
_CONNECT_S = 7.5
_MAX_REQUEST_S = 60.0  # a server that sends a byte now and then stays within the time limit of each read
_SILENCE_S = 15.0  # for so long after a request timed out, the next ones do not wait for the Hub
_log = get_logger(__name__)


@dataclass(frozen=True)
class Answer:
    """A JSON answer. `body` is None where nothing has changed since `etag` (HTTP 304)."""

    body: Any
    etag: str | None
    next_url: str | None


class HubHttp:
    """Sends requests.

    Args:
        clock: Measures how long the Hub asked to be left alone.
        sleep: Waits between attempts.
        endpoint: The Hub's URL; HF_ENDPOINT or the public Hub by default.
        timeout_s: Seconds to wait for the next bytes of an answer; half of it for a connection.
    """

    def __init__(self, clock: Clock, sleep: Wait, *, endpoint: str | None = None, timeout_s: float = 15.0) -> None:
        self._clock, self._sleep, self._timeout_s = clock, sleep, timeout_s
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._lock = threading.Lock()
        self._paused_until: dict[tuple[str, str], float] = {}
        self._silent_until = float("-inf")

    @property
    def identity(self) -> str:
        """A digest of the token; empty without one. Cached answers are kept apart by it."""
        token = hub_token()
        return hashlib.sha256(f"peft-studio {token}".encode()).hexdigest()[:16] if token else ""

    def get_json(
        self,
        path: str,
        params: Params,
        *,
        repo: Repo | None = None,
        etag: str | None = None,
        is_file: bool = False,
        patient: bool = True,
    ) -> Answer:
        """Send a GET request and parse the answer. It fails at once if a patient request has just timed out.

        Args:
            path: Below the endpoint.
            params: The query.
            repo: What it is about; None for a search.
            etag: The ETag of the answer that the caller holds.
            is_file: Whether it is a file of a repository. If it cannot be read, the error then blames the repository.
            patient: Whether to wait for a slow Hub, and to try again.

        Raises:
            StudioError: As `map_hub_error` says.
        """
        import httpx

        if self._clock.monotonic() < self._silent_until:
            raise unavailable("The Hub has just not answered in time; it is asked again shortly.")
        timeout_s = self._timeout_s if patient else min(self._timeout_s, _IMPATIENT_S)
        try:
            return self.attempt(
                path,
                repo,
                lambda: self._fetch_json(path, params, etag, timeout_s, repo if is_file else None),
                attempts=_ATTEMPTS if patient else 1,
                max_wait_s=_MAX_WAIT_S if patient else 0.0,
            )
        except errors.HubUnavailable as error:
            if patient and isinstance(error.__cause__, httpx.TimeoutException):
                self._silent_until = self._clock.monotonic() + _SILENCE_S
            raise

    def attempt(
        self,
        path: str,
        repo: Repo | None,
        once: Callable[[], R],
        *,
        attempts: int = _ATTEMPTS,
        max_wait_s: float = _MAX_WAIT_S,
        wait: Wait | None = None,
        passes: Callable[[Exception], bool] = may_pass,
        progressed: Callable[[], bool] = lambda: False,
    ) -> R:
        """Repeat a request until it works. Wait between attempts as the Hub asks.

        Args:
            path: Tells which of the Hub's rate limits applies.
            repo: What it is about; None for a search.
            once: Makes one attempt.
            attempts: How many may fail in a row.
            max_wait_s: If the Hub asks for a longer pause, the error tells its length.
            wait: Waits between attempts, in place of this object's `sleep`.
            passes: Whether an error is worth another attempt.
            progressed: Whether the failed attempt got further. The count of attempts then starts again.

        Raises:
            StudioError: As `map_hub_error` says.
        """
        import httpx

        wait = wait or self._sleep
        failures = 0
        while True:
            self._wait_out_pause(path, wait, max_wait_s)
            try:
                return once()
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                if isinstance(error, httpx.TransportError):
                    telemetry.hub_requests.labels("0").inc()
                mapped = map_hub_error(error, repo)
                failures = 1 if progressed() else failures + 1
                told_s: float | None = mapped.extras.get("retry_after_s")
                if told_s is not None:
                    self._pause(path, told_s)
                wait_s = told_s if told_s is not None else 0.5 * 2**failures
                if not passes(error) or failures >= attempts or wait_s > max_wait_s:
                    raise mapped from error
                _log.info("hub.retry", path=path, attempt=failures, wait_s=wait_s, reason=mapped.detail)
            if told_s is None:
                wait(wait_s)

    @contextmanager
    def open(
        self,
        path: str,
        *,
        params: Params | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator["httpx.Response"]:
        """Send one GET request and yield the answer before its body is read.

        Raises:
            httpx.HTTPError, OSError: As huggingface_hub raises them.
        """
        import httpx
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

        limit_s = timeout_s or self._timeout_s
        timeout = httpx.Timeout(limit_s, connect=limit_s / 2)
        sent = _headers() | (headers or {})
        limit_sessions()
        session = get_session()
        request = session.build_request("GET", self.endpoint + path, params=params, headers=sent, timeout=timeout)
        with _followed(session, request) as response:
            telemetry.hub_requests.labels(str(response.status_code)).inc()
            if not response.is_error and (told_s := told_wait_s(response)):
                self._pause(path, told_s)  # the window has no request left; the next one would be refused
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            yield response

    def _fetch_json(
        self, path: str, params: Params, etag: str | None, timeout_s: float, file_of: Repo | None
    ) -> Answer:
        import httpx

        begun = self._clock.monotonic()
        held = {"If-None-Match": etag} if etag is not None else {}
        with self.open(path, params=params, headers=held, timeout_s=timeout_s) as response:
            if response.status_code == httpx.codes.NOT_MODIFIED:
                return Answer(None, etag, None)
            content = bytearray()
            for part in response.iter_bytes():
                content += part
                if len(content) > _MAX_BODY_BYTES:
                    raise nonsense(path, f"is larger than {_MAX_BODY_BYTES} bytes", file_of=file_of)
                if self._clock.monotonic() - begun > _MAX_REQUEST_S:
                    raise unavailable(f"The Hub took more than {_MAX_REQUEST_S:.0f} s to answer.")
            body = _parse(bytes(content), path, file_of)
            return Answer(body, response.headers.get("ETag"), response.links.get("next", {}).get("url"))

    def _pause(self, path: str, seconds: float) -> None:
        until = self._clock.monotonic() + seconds
        key = self._limit_of(path)
        with self._lock:
            self._paused_until[key] = max(until, self._paused_until.get(key, until))

    def _wait_out_pause(self, path: str, wait: Wait, max_wait_s: float) -> None:
        left_s = self._paused_until.get(self._limit_of(path), float("-inf")) - self._clock.monotonic()
        if left_s > max_wait_s:
            raise unavailable("The Hub asked for a pause that is not over.", left_s)
        if left_s > 0:
            wait(left_s)

    def _limit_of(self, path: str) -> tuple[str, str]:
        """Name the rate limit of a request. The API and the files have one each for every token.

        Source: https://huggingface.co/docs/hub/rate-limits.
        """
        return self.identity, "api" if path.startswith("/api/") else "resolvers"


def nonsense(
    path: str, what: str = "is not the JSON it should be", *, file_of: Repo | None = None
) -> errors.StudioError:
    """Make the error of an answer that cannot be used.

    Args:
        path: What was asked for.
        what: What is wrong with the answer.
        file_of: The repository whose file the answer is, which the error blames; None for an answer of the Hub itself.
    """
    if file_of is not None:
        return file_of.kind.rejected(f"{path} {what}.")
    return unavailable(f"The Hub's answer to {path} {what}.")


@singleton
def limit_sessions() -> None:
    """Give every session of huggingface_hub a time limit: it has none of its own, nor have its functions that write.

    This closes the session that there is, so it comes before the first request. `HubHttp` names its own limits.
    """
    import httpx
    from huggingface_hub.utils import set_client_factory  # type: ignore[attr-defined]
    from huggingface_hub.utils._http import default_client_factory

    def limited() -> httpx.Client:
        client = default_client_factory()
        client.timeout = httpx.Timeout(_MAX_REQUEST_S, connect=_CONNECT_S)
        return client

    set_client_factory(limited)


def hub_token() -> str | None:
    """Return the token of the request, or else the one that other Hub tools would send."""
    from huggingface_hub import constants, get_token

    given = request_token.get()
    if given is not None:
        return given
    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def is_offline() -> bool:
    """Tell whether the operator has switched the Hub off (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _headers() -> dict[str, str]:
    """Make a request's headers. huggingface_hub's `build_hf_headers` would send a request of its own first."""
    from huggingface_hub import __version__

    token = hub_token()
    agent = {"User-Agent": f"peft-studio/{VERSION}; hf_hub/{__version__}; python/{platform.python_version()}"}
    return agent | ({"Authorization": f"Bearer {token}"} if token else {})


@contextmanager
def _followed(session: "httpx.Client", request: "httpx.Request") -> Iterator["httpx.Response"]:
    """Send a request, follow its redirects, and yield the final answer.

    A redirect to an address without a query keeps the request's query. The Hub sends such redirects for renamed
    repositories. httpx would drop the query, and with it the page that was asked for.

    Raises:
        httpx.HTTPError, OSError: As huggingface_hub raises them.
    """
    import httpx

    for _ in range(session.max_redirects + 1):
        response = session.send(request, stream=True, follow_redirects=False)
        try:
            if response.next_request is None:
                yield response
                return
            response.read()  # without reading, the connection could not be used again
        finally:
            response.close()
        query, request = request.url.query, response.next_request
        if query and not request.url.query:
            request.url = request.url.copy_with(query=query)
    raise httpx.TooManyRedirects("Exceeded maximum allowed redirects.", request=request)


def _parse(content: bytes, path: str, file_of: Repo | None) -> Any:
    try:
        body = from_json(content)  # unlike json.loads it refuses deep nesting and lone surrogates with a ValueError
    except ValueError as error:
        raise nonsense(path, file_of=file_of) from error
    if body is None:  # callers would take None for "nothing has changed"
        raise nonsense(path, file_of=file_of)
    return body


@singleton
def get_hub_http() -> HubHttp:
    """Return the process's HTTP access to the Hub. There is one, so that a pause holds for all requests."""
    return HubHttp(SystemClock(), time.sleep)
