"""The Hub's cache folder as huggingface_hub lays it out, with content that is checked against its name.

`<root>/models--owner--name/` (or `datasets--owner--name/`) holds `blobs/<digest>`, `refs/<branch>` (a commit) and
`snapshots/<commit>/<path>`, links into the blobs. A blob is named by the sha256 of its content, or by git's sha1 for
what lies in git itself. A blob can therefore be checked without the network. huggingface_hub does not check blobs: it
accepts a file with any content.
Source: huggingface_hub's guide "Understand caching", and its file_download.py.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import StorageFull
from core.files import fsync_folder, write_atomic
from core.logging import get_logger
from domain.hub.repos import Repo
from domain.hub.tree import RepoFile, content_hash, is_blob_name, is_commit
from services.hub.tree_cache import read_tree, write_tree

_READ_BYTES = 4 * 2**20
_LOCK_POLL_S = 0.2
_log = get_logger(__name__)


def hub_cache_dir() -> Path:
    """Return where huggingface_hub keeps downloads: HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


class Partial:
    """Content that is being downloaded. It is kept in a file of its own, hashed on the way, and can be resumed.

    Args:
        path: The file that holds it until it is complete.
        file: The repository's file that it becomes.
        check: Called now and then while earlier content is hashed. It may raise.
    """

    def __init__(self, path: Path, file: RepoFile, check: Callable[[], None]) -> None:
        self._file = file
        self._handle: BinaryIO = path.open("a+b")
        self._path = path
        self._digest: Any = content_hash(file.blob, file.size_bytes)
        self.size_bytes = 0
        self._handle.seek(0)
        while chunk := self._handle.read(_READ_BYTES):
            check()
            self._digest.update(chunk)
            self.size_bytes += len(chunk)
        if self.size_bytes > file.size_bytes:
            self.restart()

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    @property
    def is_full(self) -> bool:
        """Whether all bytes have arrived."""
        return self.size_bytes == self._file.size_bytes

    def write(self, chunk: bytes) -> None:
        """Append bytes."""
        self._handle.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def restart(self) -> None:
        """Drop what has arrived."""
        self._handle.truncate(0)
        self._digest = content_hash(self._file.blob, self._file.size_bytes)
        self.size_bytes = 0

    def matches(self) -> bool:
        """Tell whether the content has the digest that the Hub names."""
        return self.is_full and self._digest.hexdigest() == self._file.blob

    def move_to(self, blob: Path) -> None:
        """Flush it to the disk and give it its name."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        os.replace(self._path, blob)
        fsync_folder(blob.parent)


class HubCacheDir:
    """One cache folder.

    Args:
        root: The folder: HF_HUB_CACHE.
        verified_dir: Notes of the blobs that were checked, so that each is read in full only once.
        free_bytes: Takes a folder. It returns the free bytes on its device.
    """

    def __init__(
        self, root: Callable[[], Path], verified_dir: Path, free_bytes: Callable[[Path], int] | None = None
    ) -> None:
        self._root, self._verified_dir = root, verified_dir
        self._free_bytes = free_bytes or (lambda path: shutil.disk_usage(path).free)

    def snapshot(self, repo: Repo, commit: str) -> Path:
        """Return the folder of a commit, whether or not it is there."""
        return self._folder(repo) / "snapshots" / commit

    def commit_of(self, repo: Repo, revision: str) -> str | None:
        """Return the commit that a branch or tag was at when it was last downloaded."""
        return commit_at(self._folder(repo), revision)

    def note_commit(self, repo: Repo, revision: str, commit: str) -> None:
        """Remember which commit a branch or tag is at."""
        if revision == commit or self.commit_of(repo, revision) == commit:
            return
        path = self._folder(repo) / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, commit.encode(), mode=0o644)

    def tree(self, repo: Repo, commit: str) -> tuple[RepoFile, ...] | None:
        """Return every file of a commit, if its listing was kept."""
        return read_tree(self._folder(repo), repo, commit)

    def note_tree(self, repo: Repo, commit: str, files: tuple[RepoFile, ...]) -> None:
        """Keep the listing of a commit."""
        if self.tree(repo, commit) != files:
            write_tree(self._folder(repo), commit, files)

    def partial(self, repo: Repo, file: RepoFile) -> Path:
        """Return where a file's content is written until it is whole."""
        return self.blob(repo, file).with_name(f"{file.blob}.peft-studio.incomplete")

    def blob(self, repo: Repo, file: RepoFile) -> Path:
        """Return where a file's content belongs."""
        return self._folder(repo) / "blobs" / file.blob

    def missing_bytes(self, repo: Repo, file: RepoFile) -> int:
        """Return how much of a file is still to be downloaded, as far as sizes tell."""
        if _size_bytes(self.blob(repo, file)) == file.size_bytes:
            return 0
        have = _size_bytes(self.partial(repo, file)) or 0
        return file.size_bytes - have if have <= file.size_bytes else file.size_bytes

    def require_space(self, needed_bytes: int, reserve_bytes: int) -> None:
        """Refuse a download that the device cannot hold.

        Raises:
            StorageFull: Less than `needed_bytes` and `reserve_bytes` beside them are free.
        """
        folder = self._root()
        while not folder.exists():
            folder = folder.parent
        free = self._free_bytes(folder)
        if needed_bytes > 0 and free < needed_bytes + reserve_bytes:
            raise StorageFull(
                f"{needed_bytes} bytes are to be downloaded to {self._root()}, whose device has {free} free "
                f"({reserve_bytes} are kept free). Delete something there, or set HF_HOME to another device.",
                needed_bytes=needed_bytes,
                free_bytes=free,
            )

    @contextmanager
    def locked(self, repo: Repo, file: RepoFile, check: Callable[[], None]) -> Iterator[None]:
        """Keep other threads and processes, also those of huggingface_hub, from downloading the same content.

        Args:
            repo: The repository.
            file: The file.
            check: Called now and then while another one holds the lock. It may raise.
        """
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        path = self._root() / ".locks" / self._folder(repo).name / f"{file.blob}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            while True:
                check()
                try:
                    stack.enter_context(WeakFileLock(path, timeout=_LOCK_POLL_S))
                    break
                except Timeout:
                    continue
            yield

    def link(self, repo: Repo, commit: str, file: RepoFile) -> None:
        """Create the snapshot's entry of a file whose content is in the cache."""
        entry = self.snapshot(repo, commit) / file.path
        if ".." in Path(file.path).parts or Path(file.path).is_absolute():
            raise ValueError(f"{file.path!r} leaves the snapshot")  # the tree was checked before, too
        entry.parent.mkdir(parents=True, exist_ok=True)
        blob = self.blob(repo, file)
        target = os.path.relpath(blob, entry.parent)
        if entry.is_symlink() and str(entry.readlink()) == target:
            return
        fresh = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
        fresh.unlink(missing_ok=True)
        try:
            fresh.symlink_to(target)
        except OSError:  # no links on this file system, or none for this user: Windows without developer mode
            shutil.copyfile(blob, fresh)
        os.replace(fresh, entry)

    def is_intact(self, blob: Path) -> bool:
        """Tell whether a blob's content matches its name. It is read only if the file changed since the last check."""
        try:
            stamp = _stamp(blob)
        except OSError:
            return False
        try:
            if json.loads(self._note(blob, stamp).read_bytes()) == stamp:
                return True
        except (OSError, ValueError):
            pass  # there is no readable note, so the blob is checked now
        digest = content_hash(blob.name, blob.stat().st_size)
        with blob.open("rb") as handle:
            while chunk := handle.read(_READ_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != blob.name:
            _log.warning("hub_cache.corrupt_blob", blob=str(blob))
            return False
        self.note_verified(blob)
        return True

    def note_verified(self, blob: Path) -> None:
        """Note that a blob's content matches its name."""
        try:
            stamp = _stamp(blob)
            self._verified_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(self._note(blob, stamp), json.dumps(stamp).encode())
        except (StorageFull, OSError) as error:
            _log.warning("hub_cache.note_not_kept", reason=str(error))  # without the note the blob is checked again

    def damaged(self, snapshot: Path) -> list[Path]:
        """Return the blobs of a snapshot whose content does not match their names."""
        damaged = []
        for entry in sorted(snapshot.iterdir()):
            blob = _blob_of(entry)
            if blob is not None and not self.is_intact(blob):
                damaged.append(blob)
        return damaged

    def holds(self, folder: Path) -> bool:
        """Tell whether a folder is a snapshot in this cache."""
        return folder.parent.name == "snapshots" and folder.parent.parent.parent.resolve() == self._root().resolve()

    def _note(self, blob: Path, stamp: list[int]) -> Path:
        return self._verified_dir / f"{blob.name}-{stamp[0]}.json"

    def _folder(self, repo: Repo) -> Path:
        return cached_repo(self._root(), repo)


def cached_repo(root: Path, repo: Repo) -> Path:
    """Return a repository's folder in a cache, whether or not it is there."""
    return root / repo.folder_name


def commit_at(repo: Path, revision: str) -> str | None:
    """Return the commit that a branch or tag of a cached repository was at when it was last fetched, or None.

    Args:
        repo: The repository's folder.
        revision: Its name may hold slashes, but leads nowhere out of `refs`.
    """
    refs = repo / "refs"
    try:
        path = (refs / revision).resolve(strict=True)
        commit = path.read_text().strip() if path.is_relative_to(refs.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # not there, no name of a file, not text, or links in a circle
        return None
    return commit if is_commit(commit) else None


def _blob_of(entry: Path) -> Path | None:
    """Return the blob that an entry links to. An entry that is no link has no digest as its name: then None."""
    if not entry.is_symlink():
        return None
    blob = Path(os.path.normpath(entry.parent / entry.readlink()))
    return blob if is_blob_name(blob.name) else None


def _stamp(path: Path) -> list[int]:
    """Return a stamp that changes with a file's content. A program cannot set the change time back."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
