"""The listings of commits in the Hub's cache, in huggingface_hub's own place: `trees/<commit>.json`.

A commit's listing never changes. It shows without the network whether a copy in the cache is complete.
Source: huggingface_hub/_tree_cache.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from core.errors import Rejected
from core.files import write_atomic
from core.logging import get_logger
from domain.hub.repos import Repo
from domain.hub.tree import RepoFile, tree_from_wire
from domain.hub.wire import mapping

_FORMAT = 1
_log = get_logger(__name__)


def read_tree(folder: Path, repo: Repo, commit: str) -> tuple[RepoFile, ...] | None:
    """Return a commit's files, checked like an answer of the Hub; None if there is no readable listing.

    Args:
        folder: The repository's, in the cache.
        repo: Which repository it is.
        commit: All 40 digits.
    """
    path = _path(folder, commit)
    try:
        kept = mapping(from_json(path.read_bytes()))
        if kept.get("format_version") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        files = mapping(kept.get("files"))
        return tree_from_wire(repo, [_as_on_the_wire(name, mapping(facts)) for name, facts in files.items()])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, Rejected) as error:
        _log.warning("tree_cache.not_read", path=str(path), reason=str(error)[:300])
        return None


def write_tree(folder: Path, commit: str, files: Iterable[RepoFile]) -> None:
    """Keep a commit's files.

    Raises:
        StorageFull: The device has no space left.
    """
    path = _path(folder, commit)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_json({"format_version": _FORMAT, "files": dict(map(_as_kept, files))}), mode=0o644)


def _path(folder: Path, commit: str) -> Path:
    return folder / "trees" / f"{commit}.json"


def _as_kept(file: RepoFile) -> tuple[str, dict[str, Any]]:
    facts = {"size": file.size_bytes, "blob_id": file.git_sha1}
    lfs = {} if file.sha256 is None else {"lfs_sha256": file.sha256, "lfs_size": file.size_bytes}
    return file.path, facts | lfs


def _as_on_the_wire(path: str, facts: Any) -> dict[str, Any]:
    sha256 = facts.get("lfs_sha256")
    entry = {"type": "file", "path": path, "size": facts.get("size"), "oid": facts.get("blob_id")}
    return entry | ({} if sha256 is None else {"lfs": {"oid": sha256}})
