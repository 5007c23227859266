"""The Hugging Face Hub: its lists, its models, and what every repository has: commits, trees and files.

huggingface_hub's own `list_models`, `model_info` and `list_repo_tree` are not called: they hide the `Link` and
`ETag` headers, have no time limit and do not retry.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

from core import errors
from core.logging import get_logger
from core.singleton import singleton
from domain.hub.repos import Repo, model_repo
from domain.hub.tree import RepoFile, is_commit, tree_from_wire
from domain.hub.wire import text
from domain.models.records import (
    HubPage,
    ModelDetails,
    ModelSummary,
    SearchQuery,
    details_from_wire,
    files_from_wire,
    in_bounds,
    summary_from_wire,
)
from services.hub.errors import QueryRejected
from services.hub.http import HubHttp, Params, get_hub_http, nonsense
from services.hub.metadata_cache import Fetched

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
# The cursor as clients see it. The Hub's is base64. A mirror's may be anything, and is url-encoded so that it cannot
# be an address.
_CURSOR = re.compile(r"(?:[A-Za-z0-9+/=_.~-]|%[0-9A-F]{2})+")
_MAX_CURSOR_CHARACTERS = 2000
_MAX_TREE_FILES = 100_000
_log = get_logger(__name__)


class HubClient:
    """Sends questions to the Hub and reads its answers.

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
        """A digest of the token. The Hub's answers depend on the token."""
        return self._http.identity

    def search(self, query: SearchQuery, etag: str | None = None) -> Fetched[HubPage]:
        """Return one page of models. Bounds on parameters are exact here. The Hub rounds them outwards.

        Raises:
            QueryRejected: The Hub does not accept the cursor, or another part of the query.
            HubUnavailable: The Hub does not answer, or its answer cannot be read.
        """
        answer = self._http.get_json("/api/models", search_params(query), etag=etag)
        if answer.body is None:
            return Fetched(None, answer.etag)
        if not isinstance(answer.body, list):
            raise nonsense("/api/models")
        kept = tuple(model for model in _summaries(answer.body) if in_bounds(model, query))
        return Fetched(HubPage(kept, _encoded(_next_cursor("/api/models", answer.next_url))), answer.etag)

    def details(self, model_id: str, revision: str | None = None, etag: str | None = None) -> Fetched[ModelDetails]:
        """Return one model at a revision, with its config.json as far as it may be read.

        Raises:
            ModelRejected: The id or the revision cannot be one.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        repo = model_repo(model_id)
        repo.check(revision)
        at = f"/revision/{quote(revision, safe='')}" if revision is not None else ""
        answer = self._http.get_json(f"{repo.api_path}{at}", [("blobs", "true")], repo=repo, etag=etag)
        if answer.body is None:
            return Fetched(None, answer.etag)
        name = _record(summary_from_wire, answer.body).model_id
        named = model_repo(name)
        named.check()
        files = {file.path for file in files_from_wire(answer.body)}
        commit = text(answer.body.get("sha")) or revision or "main"
        config, tokenizer = (
            self._json_file(named, commit, path) if path in files else None
            for path in ("config.json", "tokenizer_config.json")
        )
        details = _record(lambda body: details_from_wire(body, revision, config, tokenizer), answer.body)
        # The ETag covers the description, not the files. Where config.json could not be read it is left out, because
        # access that is granted later would not be noticed with it.
        return Fetched(details, None if config is None and "config.json" in files else answer.etag)

    def listed_config(self, model_id: str, revision: str) -> dict[str, Any] | None:
        """Return config.json for a list of models; None if it is no JSON object. A slow Hub is not waited for.

        Raises:
            ModelRejected: There is none.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        repo = model_repo(model_id)
        repo.check()
        body = self._http.get_json(
            file_path(repo, revision, "config.json"), [], repo=repo, is_file=True, patient=False
        ).body
        return body if isinstance(body, dict) else None

    def _json_file(self, repo: Repo, commit: str, path: str) -> dict[str, Any] | None:
        """Return a repository's small JSON file, or None where it may not be read or is not an object."""
        try:
            body = self._http.get_json(file_path(repo, commit, path), [], repo=repo, is_file=True).body
        except (errors.AccessDenied, errors.ModelNotFound, errors.ModelRejected) as error:
            _log.warning("hub.file_not_read", model_id=repo.id, file=path, reason=error.detail)
            return None
        return body if isinstance(body, dict) else None

    def commit(self, repo: Repo, revision: str) -> str:
        """Return the commit that a branch or tag is at now.

        Raises:
            Rejected: The kind's own. The id or the revision cannot be one.
            NotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        repo.check(revision)
        path = f"{repo.api_path}/revision/{quote(revision, safe='')}"
        body = self._http.get_json(path, [], repo=repo).body
        commit = text(body.get("sha")) if isinstance(body, dict) else None
        if commit is None or not is_commit(commit):
            raise nonsense(path, "names no commit")
        return commit

    def tree(self, repo: Repo, commit: str) -> tuple[RepoFile, ...]:
        """Return every file of a commit.

        Raises:
            Rejected: The kind's own. The listing names a path outside of the repository, or is without end.
            NotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        repo.check()
        path = f"{repo.api_path}/tree/{commit}"
        params: Params = [("recursive", "true"), ("expand", "false")]
        entries: list[Any] = []
        cursor: str | None = None
        while True:
            more: Params = [("cursor", cursor)] if cursor is not None else []
            answer = self._http.get_json(path, params + more, repo=repo)
            if not isinstance(answer.body, list):
                raise nonsense(path)
            entries += answer.body
            cursor = _next_cursor(path, answer.next_url)
            if cursor is None:
                return tree_from_wire(repo, entries)
            if not answer.body or len(entries) > _MAX_TREE_FILES:
                raise repo.kind.rejected(f"{repo} lists more than {_MAX_TREE_FILES} files, or never ends.")


def file_path(repo: Repo, revision: str, path: str) -> str:
    """Return where a repository's file is, below the endpoint."""
    return f"{repo.file_path}/resolve/{quote(revision, safe='')}/{quote(path)}"


def search_params(query: SearchQuery) -> Params:
    """Return the Hub's query string of a search, in order.

    Raises:
        QueryRejected: The cursor cannot be one.
    """
    filters = [*query.tags, *([query.library] if query.library else [])]
    filters += [f"license:{query.license}"] if query.license else []
    bounds = {"min": query.min_parameters, "max": query.max_parameters}
    optional = {
        "search": query.query,
        "author": query.author,
        "pipeline_tag": query.task,
        "gated": None if query.gated is None else str(query.gated).lower(),
        "num_parameters": ",".join(f"{k}:{_rounded(v, up=k == 'max')}" for k, v in bounds.items() if v is not None),
        "cursor": None if query.cursor is None else _decoded(query.cursor),
    }
    return [
        *(("filter", value) for value in filters),
        *((name, value) for name, value in optional.items() if value),
        ("sort", _SORT[query.sort]),
        ("limit", str(query.limit)),
        *(("expand", name) for name in _EXPAND),
    ]


def _next_cursor(path: str, next_url: str | None) -> str | None:
    """Take the cursor out of a `Link` header. The address is not followed, because it may name another host.

    Raises:
        HubUnavailable: The cursor cannot be read, so the rest of the list is out of reach.
    """
    try:
        cursors = parse_qs(urlsplit(next_url or "").query, errors="strict").get("cursor", [])
    except ValueError as error:
        raise nonsense(path, "has a `Link` that is no address") from error
    return cursors[0] if cursors else None


def _encoded(cursor: str | None) -> str | None:
    """Write a cursor for clients. One from the Hub itself stays as it is.

    Raises:
        HubUnavailable: It is longer than a client may send.
    """
    encoded = None if cursor is None else quote(cursor, safe="+/=")
    if encoded is not None and len(encoded) > _MAX_CURSOR_CHARACTERS:
        raise nonsense("/api/models", "has a `Link` whose cursor is too long")
    return encoded


def _decoded(cursor: str) -> str:
    """Read a cursor that a client sends.

    Raises:
        QueryRejected: It cannot be one.
    """
    try:
        if len(cursor) <= _MAX_CURSOR_CHARACTERS and _CURSOR.fullmatch(cursor):
            return unquote(cursor, errors="strict")
    except ValueError:
        pass  # bytes that are no text; this server never gave out such a cursor
    raise QueryRejected("`cursor` is not one that a search returned.")


def _summaries(items: list[Any]) -> tuple[ModelSummary, ...]:
    """Read the models of a list. Items that are no models are left out.

    Raises:
        HubUnavailable: The list has items, but none of them is a model.
    """
    summaries = []
    for item in items:
        try:
            summaries.append(_record(summary_from_wire, item))
        except errors.StudioError as error:
            _log.warning("hub.item_not_read", reason=error.detail, item=repr(item)[:100])
    if items and not summaries:
        raise nonsense("/api/models")
    return tuple(summaries)


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


@singleton
def get_hub_client() -> HubClient:
    """Return the process's client of the Hub."""
    return HubClient(get_hub_http())
