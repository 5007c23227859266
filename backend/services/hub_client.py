"""The Hugging Face Hub: its lists, its models and their files.

huggingface_hub's own `list_models`, `model_info` and `list_repo_tree` are not called: they hide the `Link` and
`ETag` headers, have no time limit and do not retry.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

from core import errors
from core.logging import get_logger
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
from domain.repo_tree import RepoFile, is_commit, tree_from_wire
from services.hub_errors import QueryRejected
from services.hub_http import HubHttp, Params, nonsense
from services.metadata_cache import Fetched

R = TypeVar("R")
_SORT = {
    "downloads": "downloads",
    "likes": "likes",
    "trending": "trendingScore",
    "created": "createdAt",
    "modified": "lastModified",
}
_EXPAND = (
    *("author", "cardData", "config", "createdAt", "downloads", "gated", "lastModified"),
    *("library_name", "likes", "pipeline_tag", "safetensors", "sha", "tags"),
)
_CURSOR = re.compile(r"[A-Za-z0-9+/=_-]{1,2000}")  # base64 of something of the Hub's own
_MAX_TREE_FILES = 100_000
_log = get_logger(__name__)


class HubClient:
    """Asks the Hub.

    Args:
        http: Sends the requests.
    """

    def __init__(self, http: HubHttp) -> None:
        self._http = http

    @property
    def endpoint(self) -> str:
        """The Hub's URL."""
        return self._http.endpoint

    @property
    def identity(self) -> str:
        """Who asks, as a digest: answers differ by it."""
        return self._http.identity

    def search(self, query: SearchQuery, etag: str | None = None) -> Fetched[HubPage]:
        """Return one page of models. Bounds on parameters are exact: the Hub's own are rounded outwards.

        Raises:
            QueryRejected: The cursor, or another part of the query, is not one of the Hub's.
            HubUnavailable: It does not answer, or not sensibly.
        """
        answer = self._http.get_json("/api/models", search_params(query), etag=etag)
        if answer.body is None:
            return Fetched(None, answer.etag)
        if not isinstance(answer.body, list):
            raise nonsense("/api/models")
        models = tuple(_record(summary_from_wire, item) for item in answer.body)
        kept = tuple(item for item in models if in_bounds(item, query))
        return Fetched(HubPage(kept, _next_cursor(answer.next_url)), answer.etag)

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
        answer = self._http.get_json(f"/api/models/{model_id}{at}", [("blobs", "true")], model_id=model_id, etag=etag)
        if answer.body is None:
            return Fetched(None, answer.etag)
        name = _record(summary_from_wire, answer.body).model_id
        check_model_id(name)
        files = {item.get("rfilename") for item in answer.body.get("siblings") or () if isinstance(item, dict)}
        commit = text(answer.body.get("sha")) or revision or "main"
        config, tokenizer = (
            self._json_file(name, commit, path) if path in files else None
            for path in ("config.json", "tokenizer_config.json")
        )
        details = _record(lambda body: details_from_wire(body, revision, config, tokenizer), answer.body)
        # The ETag is of the description, not of the files: with it, access granted since would never be noticed.
        return Fetched(details, None if config is None and "config.json" in files else answer.etag)

    def listed_config(self, model_id: str, revision: str) -> dict[str, Any] | None:
        """Return config.json for a list, which does without it rather than wait; None if it is no JSON object.

        Raises:
            ModelRejected: There is none.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        check_model_id(model_id)
        path = f"/{model_id}/resolve/{quote(revision, safe='')}/config.json"
        body = self._http.get_json(path, [], model_id=model_id, is_file=True, patient=False).body
        return body if isinstance(body, dict) else None

    def _json_file(self, model_id: str, commit: str, path: str) -> dict[str, Any] | None:
        """Return a repository's small JSON file, or None where it may not be read or is not an object."""
        try:
            body = self._http.get_json(
                f"/{model_id}/resolve/{quote(commit, safe='')}/{path}", [], model_id=model_id, is_file=True
            ).body
        except (errors.AccessDenied, errors.ModelNotFound, errors.ModelRejected) as error:
            _log.warning("hub.file_not_read", model_id=model_id, file=path, reason=error.detail)
            return None
        return body if isinstance(body, dict) else None

    def commit(self, model_id: str, revision: str) -> str:
        """Return the commit that a branch or tag is at now.

        Raises:
            ModelRejected: The id or the revision cannot be one.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        check_model_id(model_id)
        check_revision(revision)
        path = f"/api/models/{model_id}/revision/{quote(revision, safe='')}"
        body = self._http.get_json(path, [], model_id=model_id).body
        commit = text(body.get("sha")) if isinstance(body, dict) else None
        if commit is None or not is_commit(commit):
            raise nonsense(path, "names no commit")
        return commit

    def tree(self, model_id: str, commit: str) -> tuple[RepoFile, ...]:
        """Return every file of a commit.

        Raises:
            ModelRejected: The listing names a path outside of the repository, or is without end.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        check_model_id(model_id)
        path = f"/api/models/{model_id}/tree/{commit}"
        params: Params = [("recursive", "true"), ("expand", "false")]
        entries: list[Any] = []
        cursor: str | None = None
        while True:
            more: Params = [("cursor", cursor)] if cursor is not None else []
            answer = self._http.get_json(path, params + more, model_id=model_id)
            if not isinstance(answer.body, list):
                raise nonsense(path)
            entries += answer.body
            cursor = _next_cursor(answer.next_url)
            if cursor is None:
                return tree_from_wire(model_id, entries)
            if not answer.body or len(entries) > _MAX_TREE_FILES:
                raise errors.ModelRejected(f"{model_id} lists more than {_MAX_TREE_FILES} files, or never ends.")


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


def _next_cursor(next_url: str | None) -> str | None:
    """Take the cursor out of a `Link`; its address is not followed, since it may be another host's."""
    cursors = parse_qs(urlsplit(next_url or "").query).get("cursor", [])
    return cursors[0] if cursors and _CURSOR.fullmatch(cursors[0]) else None


def _record(read: Callable[[Any], R], body: Any) -> R:
    try:
        if not isinstance(body, dict):
            raise ValueError("not an object")
        return read(body)
    except ValueError as error:
        raise nonsense("/api/models") from error


def _rounded(parameters: int, *, up: bool) -> str:
    """Write a number in the units of the Hub's range syntax (`min:6B,max:8B`), rounded outwards to three digits."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters % unit == 0 and parameters:
            return f"{parameters // unit}{letter}"
    step = 10**6 if parameters >= 10**6 else 10**3
    units = -(-parameters // step) if up else parameters // step
    return f"{units}{'M' if step == 10**6 else 'K'}" if units else "0"
