"""The Hugging Face Hub: its lists, its models and its errors, in this service's terms.

Requests go through huggingface_hub's session, headers and error classes, so that HF_TOKEN, proxies and
HF_HUB_OFFLINE mean what they mean everywhere. Its `list_models` and `model_info` themselves are not called: they
hide the `Link` and `ETag` headers, have no time limit and do not retry.
"""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

from pydantic_core import from_json

from core import errors
from core.clock import Clock
from core.logging import get_logger
from core.version import VERSION
from domain.model_records import (
    HubPage,
    ModelDetails,
    SearchQuery,
    check_model_id,
    check_revision,
    details_from_wire,
    in_bounds,
    summary_from_wire,
    text,
)
from services.metadata_cache import Fetched

if TYPE_CHECKING:
    import httpx

R = TypeVar("R")
Params = list[tuple[str, str | int | float | bool | None]]
_SORT = {
    "downloads": "downloads",
    "likes": "likes",
    "trending": "trendingScore",
    "created": "createdAt",
    "modified": "lastModified",
}
_EXPAND = (
    *("author", "cardData", "config", "createdAt", "downloads", "gated", "lastModified"),
    *("library_name", "likes", "pipeline_tag", "safetensors", "tags"),
)
_CURSOR = re.compile(r"[A-Za-z0-9+/=_-]{1,2000}")  # base64 of something of the Hub's own
_ATTEMPTS = 3
_MAX_WAIT_S = 10.0  # a client waits meanwhile; a longer pause is told to it instead
_MAX_BODY_BYTES = 32 * 2**20  # 100 models expanded are 1-2 MB, the largest tokenizer_config.json some 10 MB
_MAX_REQUEST_S = 60.0  # a server that dribbles passes every read's time limit
_log = get_logger(__name__)


class QueryRejected(errors.Rejected):
    """The Hub refuses the search as it stands."""

    slug, title = "query-rejected", "Query rejected"


@dataclass(frozen=True)
class _Answer:
    body: Any  # None: not modified
    etag: str | None
    next_url: str | None
    url: str


class HubClient:
    """Asks the Hub.

    Args:
        clock: Measures how long the Hub asked to be left alone.
        sleep: Waits between attempts.
        endpoint: The Hub's URL; HF_ENDPOINT or the public Hub by default.
        timeout_s: Seconds to wait for the next bytes of an answer; half of it for a connection.
    """

    def __init__(
        self, clock: Clock, sleep: Callable[[float], None], *, endpoint: str | None = None, timeout_s: float = 15.0
    ) -> None:
        self._clock, self._sleep, self._timeout_s = clock, sleep, timeout_s
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._paused_until = float("-inf")

    @property
    def authenticated(self) -> bool:
        """Whether requests carry a token: answers differ by it."""
        return "authorization" in _headers()

    def search(self, query: SearchQuery, etag: str | None = None) -> Fetched[HubPage]:
        """Return one page of models. Bounds on parameters are exact: the Hub's own are rounded outwards.

        Raises:
            QueryRejected: The cursor, or another part of the query, is not one of the Hub's.
            HubUnavailable: It does not answer, or not sensibly.
        """
        answer = self._get("/api/models", search_params(query), etag=etag)
        if answer.body is None:
            return Fetched(None, answer.etag)
        if not isinstance(answer.body, list):
            raise _nonsense("/api/models")
        models = tuple(_record(summary_from_wire, item) for item in answer.body)
        cursors = parse_qs(urlsplit(answer.next_url or "").query).get("cursor", [None])
        next_cursor = cursors[0] if cursors[0] and _CURSOR.fullmatch(cursors[0]) else None
        return Fetched(HubPage(tuple(item for item in models if in_bounds(item, query)), next_cursor), answer.etag)

    def details(self, model_id: str, revision: str | None = None, etag: str | None = None) -> Fetched[ModelDetails]:
        """Return one model at a revision, with its config.json as far as it may be read.

        Raises:
            ModelRejected: The id or the revision cannot be one.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        check_model_id(model_id)
        if revision is not None:
            check_revision(revision)
        at = f"/revision/{quote(revision, safe='')}" if revision is not None else ""
        answer = self._get(f"/api/models/{model_id}{at}", [("blobs", "true")], model_id=model_id, etag=etag)
        if answer.body is None:
            return Fetched(None, answer.etag)
        name = _record(summary_from_wire, answer.body).model_id
        if name != model_id and "blobs" not in urlsplit(answer.url).query:
            # Renamed, and the redirection dropped the query: without it there are no file sizes.
            check_model_id(name)
            answer = self._get(f"/api/models/{name}{at}", [("blobs", "true")], model_id=model_id)
        files = {item.get("rfilename") for item in answer.body.get("siblings") or () if isinstance(item, dict)}
        commit = text(answer.body.get("sha")) or revision or "main"
        config, tokenizer = (
            self._json_file(name, commit, path) if path in files else None
            for path in ("config.json", "tokenizer_config.json")
        )
        details = _record(lambda body: details_from_wire(body, revision, config, tokenizer), answer.body)
        # The ETag is of the description, not of the files: with it, access granted since would never be noticed.
        return Fetched(details, None if config is None and "config.json" in files else answer.etag)

    def _json_file(self, model_id: str, commit: str, path: str) -> dict[str, Any] | None:
        """Return a repository's small JSON file, or None where access to it is gated or it is not an object."""
        try:
            body = self._get(
                f"/{model_id}/resolve/{quote(commit, safe='')}/{path}", [], model_id=model_id, is_file=True
            ).body
        except errors.ModelGated:
            return None  # the summary says that the model is gated
        except errors.ModelRejected as error:
            _log.warning("hub.file_not_read", model_id=model_id, file=path, reason=error.detail)
            return None
        return body if isinstance(body, dict) else None

    def _get(
        self,
        path: str,
        params: Params,
        *,
        model_id: str | None = None,
        etag: str | None = None,
        is_file: bool = False,
    ) -> _Answer:
        import httpx

        pause_s = self._paused_until - self._clock.monotonic()
        if pause_s > 0:
            raise _unavailable("The Hub asked for a pause that is not over.", pause_s)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._request(path, params, etag, is_file=is_file)
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                mapped = map_hub_error(error, model_id)
                wait_s = _wait_before_retry_s(error, mapped, attempt)
                if wait_s is None:
                    told_s = mapped.extras.get("retry_after_s", 0.0)
                    self._paused_until = max(self._paused_until, self._clock.monotonic() + told_s)
                    raise mapped from error
                _log.info("hub.retry", path=path, attempt=attempt, wait_s=wait_s, reason=mapped.detail)
            self._sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _request(self, path: str, params: Params, etag: str | None, *, is_file: bool) -> _Answer:
        import httpx
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

        headers = _headers() | ({"If-None-Match": etag} if etag is not None else {})
        timeout = httpx.Timeout(self._timeout_s, connect=self._timeout_s / 2)
        begun = self._clock.monotonic()
        with get_session().stream(
            "GET", self.endpoint + path, params=params, headers=headers, timeout=timeout
        ) as response:
            if response.status_code == httpx.codes.NOT_MODIFIED:
                return _Answer(None, etag, None, str(response.url))
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            content = bytearray()
            for part in response.iter_bytes():
                content += part
                if len(content) > _MAX_BODY_BYTES:
                    raise _nonsense(path, f"is larger than {_MAX_BODY_BYTES} bytes", is_file=is_file)
                if self._clock.monotonic() - begun > _MAX_REQUEST_S:
                    raise _unavailable(f"The Hub took more than {_MAX_REQUEST_S:.0f} s to answer.")
            return _Answer(
                _parse(bytes(content), path, is_file=is_file),
                response.headers.get("ETag"),
                response.links.get("next", {}).get("url"),
                str(response.url),
            )


def search_params(query: SearchQuery) -> Params:
    """Return the Hub's query string of a search, in order.

    Raises:
        QueryRejected: The cursor cannot be one.
    """
    if query.cursor is not None and not _CURSOR.fullmatch(query.cursor):
        raise QueryRejected("`cursor` is not one that a search returned.")
    filters = [*query.tags, *([query.library] if query.library else [])]
    filters += [f"license:{query.license}"] if query.license else []
    bounds = {"min": query.min_parameters, "max": query.max_parameters}
    optional = {
        "search": query.query,
        "author": query.author,
        "pipeline_tag": query.task,
        "gated": None if query.gated is None else str(query.gated).lower(),
        "num_parameters": ",".join(f"{k}:{_rounded(v, up=k == 'max')}" for k, v in bounds.items() if v is not None),
        "cursor": query.cursor,
    }
    return [
        *(("filter", value) for value in filters),
        *((name, value) for name, value in optional.items() if value),
        ("sort", _SORT[query.sort]),
        ("limit", str(query.limit)),
        *(("expand", name) for name in _EXPAND),
    ]


def map_hub_error(error: Exception, model_id: str | None) -> errors.StudioError:
    """Turn an error of huggingface_hub, of its HTTP client or of its files into one of this service's.

    Args:
        error: What was caught.
        model_id: The model that was asked for; None for a search.
    """
    import httpx
    from huggingface_hub import errors as hub

    subject = model_id or "the list of models"
    match error:
        case errors.StudioError():
            return error
        case hub.OfflineModeIsEnabled():
            return _unavailable("HF_HUB_OFFLINE is set: the Hub is not asked.")
        case hub.GatedRepoError():
            return errors.ModelGated(
                f"{subject} is gated: accept its licence on its page, and set HF_TOKEN to a token of that account.",
                model_id=model_id,
            )
        case hub.DisabledRepoError():
            return errors.AccessDenied(f"The Hub has disabled {subject}.")
        case hub.RevisionNotFoundError():
            return errors.ModelNotFound(f"{subject} has no such revision.")
        case hub.RemoteEntryNotFoundError():
            return errors.ModelRejected(f"{subject} lacks a file that it should have.")
        case hub.RepositoryNotFoundError():
            return errors.ModelNotFound(f"The Hub has no model {subject}, or it is private and HF_TOKEN has no access.")
        case hub.HFValidationError():
            return errors.ModelRejected(f"The Hub's client refuses the id: {error}")
        case hub.HfHubHTTPError():
            return _map_status(error.response, model_id, subject)
        case hub.LocalEntryNotFoundError() if isinstance(error.__cause__, Exception):
            return map_hub_error(error.__cause__, model_id)  # a download hides the Hub's answer behind this one
        case hub.LocalEntryNotFoundError() | httpx.HTTPError() | ConnectionError() | TimeoutError():
            return _unavailable(f"The Hub cannot be reached ({type(error).__name__}).")
        case httpx.InvalidURL():
            return _unavailable(f"The Hub's address is not a URL: {error}")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return errors.StorageFull("No space is left on the device that holds HF_HOME.")
        case OSError() if error.errno is None:  # raised by the client itself: what it got is not what was announced
            return _unavailable(f"The Hub's answer is incomplete: {error}")
    return errors.StudioError(f"The Hub's client failed: {type(error).__name__}: {error}")


def _map_status(response: "httpx.Response", model_id: str | None, subject: str) -> errors.StudioError:
    status, message = response.status_code, response.headers.get("X-Error-Message", "")
    if status == 401 and (model_id is None or "Invalid credentials" in message):
        return errors.AccessDenied("The Hub refuses the token in HF_TOKEN: renew it, or unset it for public models.")
    if status in (401, 404) and model_id is not None:
        return errors.ModelNotFound(f"The Hub has no model {model_id}, or it is private and HF_TOKEN has no access.")
    if status == 403:
        return errors.AccessDenied(f"The Hub denies access to {subject}.")
    if status in (400, 422):
        kind = QueryRejected if model_id is None else errors.ModelRejected
        return kind(f"The Hub refuses the request: {message[:200] or 'it does not say why'}.")
    return _unavailable(f"The Hub answers {status} {response.reason_phrase}.", _told_wait_s(response))


def _told_wait_s(response: "httpx.Response") -> float | None:
    """Return for how long the Hub asks to be left alone: RateLimit of an exhausted window, or Retry-After."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:  # a date, measured against the Hub's own clock
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(response.headers.get("Date", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, wait.total_seconds())


def _wait_before_retry_s(error: Exception, mapped: errors.StudioError, attempt: int) -> float | None:
    """Return the wait before the next attempt, or None if there should be none."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    passing = isinstance(error, HfHubHTTPError) and error.response.status_code in (408, 429, 500, 502, 503, 504)
    # A host that cannot be connected to is not there: asking again would only double the wait for the local answer.
    passing |= isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout | httpx.ReadError | httpx.RemoteProtocolError)
    if not passing or attempt == _ATTEMPTS:
        return None
    wait_s: float = mapped.extras.get("retry_after_s", 0.5 * 2**attempt)
    return wait_s if wait_s <= _MAX_WAIT_S else None


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers: dict[str, str] = build_hf_headers(library_name="peft-studio", library_version=VERSION)
    return headers


def _unavailable(detail: str, retry_after_s: float | None = None) -> errors.HubUnavailable:
    return errors.HubUnavailable(detail, **({} if retry_after_s is None else {"retry_after_s": retry_after_s}))


def _nonsense(path: str, what: str = "is not the JSON it should be", *, is_file: bool = False) -> errors.StudioError:
    return errors.ModelRejected(f"{path} {what}.") if is_file else _unavailable(f"The Hub's answer to {path} {what}.")


def _parse(content: bytes, path: str, *, is_file: bool) -> Any:
    try:
        return from_json(content)  # unlike json.loads it refuses deep nesting and lone surrogates with a ValueError
    except ValueError as error:
        raise _nonsense(path, is_file=is_file) from error


def _record(read: Callable[[Any], R], body: Any) -> R:
    try:
        if not isinstance(body, dict):
            raise ValueError("not an object")
        return read(body)
    except ValueError as error:
        raise _nonsense("/api/models") from error


def _rounded(parameters: int, *, up: bool) -> str:
    """Write a number in the units of the Hub's range syntax (`min:6B,max:8B`), rounded outwards to three digits."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters % unit == 0 and parameters:
            return f"{parameters // unit}{letter}"
    step = 10**6 if parameters >= 10**6 else 10**3
    units = -(-parameters // step) if up else parameters // step
    return f"{units}{'M' if step == 10**6 else 'K'}" if units else "0"
