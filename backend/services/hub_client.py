"""The Hub's metadata API, spoken with huggingface_hub's own session, headers and endpoint."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from core.errors import HubUnavailable
from domain.model_records import SearchQuery
from services.hub_errors import map_hub_error, retry_after_s

_TIMEOUT_S = 10.0
_ATTEMPTS = 3
_LONGEST_WAIT_S = 5.0  # a client waits for the answer; longer pauses are passed on as Retry-After
_SORTS = {
    "downloads": "downloads",
    "likes": "likes",
    "trending": "trendingScore",
    "created": "createdAt",
    "modified": "lastModified",
}
_EXPAND = (
    "author",
    "cardData",
    "config",
    "createdAt",
    "downloads",
    "gated",
    "lastModified",
    "library_name",
    "likes",
    "pipeline_tag",
    "safetensors",
    "tags",
)


@dataclass(frozen=True)
class HubAnswer:
    """A JSON document with what revalidates it; `document` is None where the Hub says "not modified"."""

    document: Any
    etag: str | None
    next_cursor: str | None


class HubClient:
    """Asks the Hub. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to every Hub tool.

    Args:
        sleep: Waits between attempts.
    """

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep

    def search(self, query: SearchQuery, etag: str | None = None) -> HubAnswer:
        """List models, one page.

        Raises:
            HubUnavailable: The Hub cannot be reached or asks for a pause.
        """
        filters = [*query.tags, *([query.library] if query.library else [])]
        filters += [f"license:{query.license}"] if query.license else []
        params: list[tuple[str, str]] = [("filter", value) for value in filters]
        params += [("expand", name) for name in _EXPAND]
        for name, value in (("search", query.query), ("author", query.author), ("pipeline_tag", query.task)):
            params += [(name, value)] if value else []
        if query.gated is not None:
            params.append(("gated", str(query.gated).lower()))
        bounds = [("min", query.min_parameters), ("max", query.max_parameters)]
        parameters = ",".join(f"{name}:{value}" for name, value in bounds if value is not None)
        params += [("num_parameters", parameters)] if parameters else []
        params += [("sort", _SORTS[query.sort]), ("limit", str(query.limit))]
        params += [("cursor", query.cursor)] if query.cursor else []
        return self._get("/api/models", params, etag, None)

    def model(self, model_id: str, revision: str | None, etag: str | None = None) -> HubAnswer:
        """Return a model's metadata with its files and their sizes.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        path = f"/api/models/{model_id}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
        return self._get(path, [("blobs", "true")], etag, model_id)

    def config(self, model_id: str, sha: str) -> dict[str, Any] | None:
        """Return a commit's config.json, or None where it has none that is an object.

        Raises:
            ModelGated, HubUnavailable: As the Hub says.
        """
        answer = self._get(f"/{model_id}/resolve/{quote(sha, safe='')}/config.json", [], None, model_id)
        return answer.document if isinstance(answer.document, dict) else None

    def _get(self, path: str, params: list[tuple[str, str]], etag: str | None, model_id: str | None) -> HubAnswer:
        import httpx
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        if constants.HF_HUB_OFFLINE:
            raise HubUnavailable("The Hub is not asked: HF_HUB_OFFLINE is set.")
        headers = build_hf_headers() | ({"If-None-Match": etag} if etag else {})
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = get_session().get(
                    constants.ENDPOINT + path,
                    params=httpx.QueryParams(params),
                    headers=headers,
                    timeout=_TIMEOUT_S,
                    follow_redirects=True,
                )
                if response.status_code == 304:
                    return HubAnswer(None, etag, None)
                hf_raise_for_status(response)
                following = next_cursor(response.headers.get("link"))
                return HubAnswer(response.json(), response.headers.get("etag"), following)
            except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, ValueError, OSError) as error:
                wait_s = self._pause(error, attempt)
                if wait_s is None:
                    raise map_hub_error(error, model_id) from error
                self._sleep(wait_s)
        raise HubUnavailable("The Hub did not answer.")

    def _pause(self, error: Exception, attempt: int) -> float | None:
        """Return how long to wait before another attempt, or None to give up."""
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if attempt == _ATTEMPTS or (status is not None and status != 429 and status < 500):
            return None
        if response is not None and status in (429, 503):
            told = retry_after_s(dict(response.headers))
            return told if told <= _LONGEST_WAIT_S else None
        # Unreachable is answered at once from what is local; only a server in trouble is asked again.
        return 0.5 * 2.0 ** (attempt - 1) if status is not None else None


def next_cursor(link: str | None) -> str | None:
    """Take the cursor out of `Link: <url>; rel="next"`; the URL itself is never followed."""
    found = re.search(r'<([^>]+)>\s*;\s*rel="next"', link or "")
    return parse_qs(urlsplit(found.group(1)).query).get("cursor", [None])[0] if found else None
