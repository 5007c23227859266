"""Maps the errors of huggingface_hub, of its HTTP client and of its files to those of this service."""

import errno
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from core import errors
from domain.hub.repos import MODELS, Repo

if TYPE_CHECKING:
    import httpx

_PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})


class QueryRejected(errors.Rejected):
    """The Hub does not accept the search as the client wrote it."""

    slug, title = "query-rejected", "Query rejected"


def map_hub_error(error: Exception, repo: Repo | None) -> errors.StudioError:
    """Turn an error of huggingface_hub, of its HTTP client or of its files into one of this service's.

    Args:
        error: What was caught.
        repo: What was asked for; None for a search of models.
    """
    import httpx
    from huggingface_hub import errors as hub

    kind = repo.kind if repo is not None else MODELS
    subject = repo or "the list of models"
    match error:
        case errors.StudioError():
            return error
        case hub.OfflineModeIsEnabled():
            return unavailable("HF_HUB_OFFLINE is set: the Hub is not asked.")
        case hub.GatedRepoError() if repo is not None:
            return repo.access_to_ask_for()
        case hub.DisabledRepoError():
            return errors.AccessDenied(f"The Hub has disabled {subject}.")
        case hub.RevisionNotFoundError() if repo is not None:
            return repo.no_such_revision()
        case hub.RemoteEntryNotFoundError():
            return kind.rejected(f"{subject} lacks a file that it should have.")
        case hub.RepositoryNotFoundError() if repo is not None and not _blames_the_token(error.response):
            return repo.not_found()
        case hub.HFValidationError():
            return kind.rejected(f"The Hub's client refuses the id: {error}")
        case hub.HfHubHTTPError():
            return _map_status(error.response, repo)
        case hub.LocalEntryNotFoundError() if isinstance(error.__cause__, Exception):
            return map_hub_error(error.__cause__, repo)  # a download wraps the Hub's answer in this error
        case hub.LocalEntryNotFoundError() | httpx.HTTPError() | ConnectionError() | TimeoutError():
            return unavailable(f"The Hub cannot be reached ({type(error).__name__}).")
        case httpx.InvalidURL():
            return unavailable(f"The Hub's address is not a URL: {error}")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return errors.StorageFull("No space is left on the device that holds HF_HOME.")
        case OSError() if error.errno is None:  # the client's own: an answer of the wrong length
            return unavailable(f"The Hub's answer is incomplete: {error}")
    return errors.StudioError(f"The Hub's client failed: {type(error).__name__}: {error}")


def unavailable(detail: str, retry_after_s: float | None = None) -> errors.HubUnavailable:
    """Make the error of a Hub that does not answer. It tells how long to wait, if that is known."""
    return errors.HubUnavailable(detail, **({} if retry_after_s is None else {"retry_after_s": retry_after_s}))


def partly_here(error: errors.HubUnavailable, repo: Repo, lacking: Sequence[str]) -> errors.HubUnavailable:
    """Make the error of a Hub that does not answer when part of what is asked for is on this machine."""
    missing = f"{error.detail} {repo} is on this machine only in part, without {' and without '.join(lacking)}."
    return errors.HubUnavailable(missing, **error.extras)


def may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed soon.

    A refused connection is not tried again: that would only double the wait for the local answer.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING_STATUSES
    return isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout | httpx.ReadError | httpx.RemoteProtocolError)


def told_wait_s(response: "httpx.Response") -> float | None:
    """Return how long the Hub asks clients to wait: by RateLimit of an exhausted window, or by Retry-After.

    Source: https://huggingface.co/docs/hub/rate-limits and RFC 9110 section 10.2.3.
    """
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0 and (response.status_code == 429 or not response.is_error):
        return float(limit.reset_in_seconds)
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:  # a date, measured against the Hub's own clock
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(response.headers.get("Date", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, wait.total_seconds())


def _map_status(response: "httpx.Response", repo: Repo | None) -> errors.StudioError:
    status, message = response.status_code, response.headers.get("X-Error-Message", "")
    if _blames_the_token(response) or (status == 401 and repo is None):
        public = f"public {repo.kind.plural if repo is not None else MODELS.plural}"
        return errors.AccessDenied(
            f"The Hub refuses the token (of the request's header, or HF_TOKEN): renew it, or leave it out for {public}."
        )
    if status in (401, 404) and repo is not None:
        return repo.not_found()
    if status == 403:
        return errors.AccessDenied(f"The Hub denies access to {repo or 'the list of models'}.")
    if status in (400, 422):
        kind = QueryRejected if repo is None else repo.kind.rejected
        return kind(f"The Hub refuses the request: {message[:200] or 'it does not say why'}.")
    return unavailable(f"The Hub answers {status} {response.reason_phrase}.", told_wait_s(response))


def _blames_the_token(response: "httpx.Response") -> bool:
    """Tell whether a 401 is about the token and not about the repository.

    For a repository that does not exist, the Hub answers 401 without a token and 404 with one. A 401 without an error
    code to a request with a token is therefore about the token, whatever its text says.
    """
    if response.status_code != 401 or response.headers.get("X-Error-Code"):
        return False
    sent = "Authorization" in response.request.headers
    return sent or "Invalid credentials" in response.headers.get("X-Error-Message", "")
