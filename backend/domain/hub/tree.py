"""The files of a repository as its tree lists them. Their names are checked before they are used on a disk."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from domain.hub.repos import Repo
from domain.hub.wire import count, mapping, text

_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 255  # what the usual file systems allow


@dataclass(frozen=True)
class RepoFile:
    """A file of a commit.

    Attributes:
        path: Relative, with `/`, without `.` and `..`.
        size_bytes: Of its content.
        git_sha1: Of its content as git hashes a blob; of the pointer where there is a `sha256`.
        sha256: Of its content, where the Hub stores it outside of git.
    """

    path: str
    size_bytes: int
    git_sha1: str
    sha256: str | None

    @property
    def blob(self) -> str:
        """The name of its content in the Hub's cache: its sha256 digest, or else git's sha1."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Selection:
    """What a load reads. The small files come first, because they may be a reason to refuse the load."""

    small: tuple[RepoFile, ...]
    weights: tuple[RepoFile, ...]

    @property
    def all(self) -> tuple[RepoFile, ...]:
        """All files."""
        return self.small + self.weights


def content_hash(blob: str, size_bytes: int) -> Any:
    """Return a hashlib object that makes a blob's name from its content.

    Args:
        blob: The name, 64 hexadecimal digits of sha256 or 40 of git's sha1.
        size_bytes: Of the content; git hashes it first. Source: git's "Git Objects", Pro Git section 10.2.
    """
    if _SHA256.fullmatch(blob):
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % size_bytes)
    return digest


def is_blob_name(name: str) -> bool:
    """Tell whether a name is a digest."""
    return bool(_SHA1.fullmatch(name) or _SHA256.fullmatch(name))


def is_commit(revision: str | None) -> bool:
    """Tell whether a revision is a full commit id. Such a revision never changes."""
    return revision is not None and bool(_SHA1.fullmatch(revision))


def tree_from_wire(repo: Repo, entries: Iterable[Any]) -> tuple[RepoFile, ...]:
    """Read the Hub's tree of a commit.

    Raises:
        Rejected: An error of the repository's kind. A path leads out of the repository or is listed twice, or an entry
            is broken.
    """
    files: dict[str, RepoFile] = {}
    for entry in map(mapping, entries):
        path = text(entry.get("path"))
        if path is None or not _is_inside(path):
            raise repo.kind.rejected(f"{repo} lists {str(path)[:100]!r}, which is no path in a repository.")
        if entry.get("type") != "file":
            continue
        if path in files:
            raise repo.kind.rejected(f"{repo} lists {path[:100]!r} twice.")
        lfs = mapping(entry.get("lfs"))
        size, sha1, sha256 = count(entry.get("size")), text(entry.get("oid")), text(lfs.get("oid"))
        named = sha1 is not None and _SHA1.fullmatch(sha1) and (sha256 is None or _SHA256.fullmatch(sha256))
        if sha1 is None or size is None or not named or (lfs and sha256 is None):
            raise repo.kind.rejected(f"{repo} lists {path[:100]!r} without its size or its digest.")
        files[path] = RepoFile(path, size, sha1, sha256)
    return tuple(files.values())


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return (
        len(path.encode(errors="replace")) <= _MAX_PATH_BYTES
        and "\\" not in path
        and path.isprintable()
        and not any(part in ("", ".", "..") or len(part.encode()) > _MAX_PART_BYTES for part in parts)
        and not _DRIVE.match(path)
    )
