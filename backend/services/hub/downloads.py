"""Downloads into the Hub's cache. They are shared, resumed, checked, and stopped when nobody waits.

huggingface_hub's `snapshot_download` is not used: it starts a file again after a broken connection, checks lengths but
no digest, cannot be stopped, and reports a rate limit as "not found locally".
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from core import errors
from core.clock import Clock, SystemClock
from core.logging import get_logger
from core.parallel import start_workers
from core.settings import get_settings
from core.singleton import singleton
from domain.hub.repos import Repo
from domain.hub.tree import RepoFile, is_commit
from services.hub.cache_dir import HubCacheDir, hub_cache_dir
from services.hub.client import HubClient, get_hub_client
from services.hub.download_flight import Flight, Flights, Progress
from services.hub.errors import partly_here
from services.hub.file_transfer import FileTransfer
from services.hub.http import HubHttp, get_hub_http
from services.hub.snapshot_spec import SnapshotSpec

_WORKERS = 4  # files at once; one connection does not fill a fast line
_RESERVE_BYTES = 64 * 2**20  # for the database and logs, which may be on the same device
_SHOWN = 3  # of the files that are missing, in a message
_log = get_logger(__name__)


@dataclass(frozen=True)
class Listing:
    """What a repository holds at a commit.

    Attributes:
        revision: The branch, tag or commit that was asked for.
        commit: The commit that the revision is at.
        files: All files of the commit.
        away: Why the Hub did not answer; None if it did. The listing is then that of the last complete download.
    """

    repo: Repo
    revision: str
    commit: str
    files: tuple[RepoFile, ...]
    away: errors.HubUnavailable | None = None


class Downloads:
    """Downloads files of repositories to this machine.

    Args:
        http: Sends the requests for files.
        client: Finds out commits and trees.
        cache: Holds the files.
        clock: Measures speeds.
        sleep: Waits between attempts.
        timeout_s: Seconds to wait for the next bytes; HF_HUB_DOWNLOAD_TIMEOUT by default.
    """

    def __init__(
        self,
        http: HubHttp,
        client: HubClient,
        cache: HubCacheDir,
        clock: Clock,
        sleep: Callable[[float], None] = time.sleep,
        *,
        timeout_s: float | None = None,
    ) -> None:
        self._http, self._client, self.cache = http, client, cache
        self._transfer = FileTransfer(http, cache, clock, sleep, timeout_s)
        self._flights = Flights(clock)

    def fetch(
        self,
        repo: Repo,
        revision: str | None,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
        *,
        spec: SnapshotSpec,
    ) -> Path:
        """Return the snapshot's folder. It holds everything that a load reads, and each file's content is checked.

        Args:
            repo: Which repository.
            revision: Branch, tag or commit; `main` if None.
            on_progress: Called on this thread about ten times a second.
            cancelled: Called as often. The download itself stops when the last waiting caller has left.
            spec: Which files of it are downloaded.

        Raises:
            Rejected: An error of the repository's kind. The id is not valid, or the repository cannot be used.
            NeedsRemoteCode, NoSafeWeights: It could not be loaded safely; no weights were downloaded.
            StorageFull: The device cannot hold it; nothing was downloaded.
            DownloadCorrupt: The content does not match the digest that the Hub names.
            DownloadCancelled: `cancelled` returned true.
            NotFound, AccessDenied, HubUnavailable: The Hub says so, and this machine has no copy.
        """
        repo.check(revision)
        key = (repo, revision or "main", self._http.identity, spec)
        return self._flights.join(
            key,
            repo.id,
            lambda flight: self._download(repo, revision or "main", flight, spec),
            on_progress,
            cancelled,
        )

    def list_files(self, repo: Repo, revision: str | None, cancelled: Callable[[], bool]) -> Listing:
        """Return the files at a revision. The Hub is not asked about a commit whose listing is kept.

        Args:
            repo: Which repository.
            revision: Branch, tag or commit; `main` if None.
            cancelled: Asked about ten times a second.

        Raises:
            Rejected: An error of the repository's kind. The id is not valid, or the repository cannot be used.
            DownloadCancelled: `cancelled` returned true.
            NotFound, AccessDenied, HubUnavailable: The Hub says so, and no listing is kept.
        """
        repo.check(revision)
        at = revision or "main"
        key = (repo, at, self._http.identity)
        return self._flights.join(key, repo.id, lambda _: self._listing(repo, at), lambda _: None, cancelled)

    def fetch_files(
        self,
        listing: Listing,
        paths: Iterable[str],
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        """Return the snapshot's folder with some files of a listing. Each file's content is checked.

        Args:
            listing: The files of the commit.
            paths: The files to download.
            on_progress: Called on this thread about ten times a second.
            cancelled: Called as often. The download itself stops when the last waiting caller has left.

        Raises:
            StorageFull: The device cannot hold them; nothing was downloaded.
            DownloadCorrupt: The content does not match the digest that the Hub names.
            DownloadCancelled: `cancelled` returned true.
            NotFound, AccessDenied, HubUnavailable: The Hub says so, and this machine has no copy.
        """
        names = frozenset(paths)
        files = tuple(file for file in listing.files if file.path in names)
        key = (listing.repo, listing.commit, self._http.identity, names, listing.away is None)
        return self._flights.join(
            key,
            listing.repo.id,
            lambda flight: self._fetch_listed(listing, files, flight),
            on_progress,
            cancelled,
        )

    def _listing(self, repo: Repo, revision: str) -> Listing:
        if is_commit(revision) and (files := self.cache.tree(repo, revision)) is not None:
            return Listing(repo, revision, revision, files)
        try:
            commit = revision if is_commit(revision) else self._client.commit(repo, revision)
            files = self.cache.tree(repo, commit)
            return Listing(repo, revision, commit, files if files is not None else self._client.tree(repo, commit))
        except errors.HubUnavailable as error:
            held = self.cache.commit_of(repo, revision)
            files = self.cache.tree(repo, held) if held is not None else None
            if held is None or files is None:
                raise
            _log.warning("hub_download.served_from_disk", repo=repo.id, reason=error.detail)
            return Listing(repo, revision, held, files, away=error)

    def _fetch_listed(self, listing: Listing, files: tuple[RepoFile, ...], flight: Flight) -> Path:
        repo, commit = listing.repo, listing.commit
        if listing.away is not None:
            lacking = [file.path for file in files if not self.cache.is_intact(self.cache.blob(repo, file))]
            if lacking:
                more = [f"{len(lacking) - _SHOWN} more files"] if len(lacking) > _SHOWN else []
                raise partly_here(listing.away, repo, lacking[:_SHOWN] + more)
        self._prepare(repo, files, flight)
        self.cache.note_tree(repo, commit, listing.files)
        self._fetch_all(repo, commit, files, flight)
        return self.cache.snapshot(repo, commit)

    def _prepare(self, repo: Repo, files: tuple[RepoFile, ...], flight: Flight) -> None:
        """Set the size of the download, and refuse one that the device cannot hold."""
        flight.total_bytes = sum(file.size_bytes for file in files)
        missing = sum(self.cache.missing_bytes(repo, file) for file in files)
        self.cache.require_space(missing, _RESERVE_BYTES)

    def _download(self, repo: Repo, revision: str, flight: Flight, spec: SnapshotSpec) -> Path:
        here = self._whole(repo, revision if is_commit(revision) else None, spec)
        if here is not None:
            return here
        try:
            commit = revision if is_commit(revision) else self._client.commit(repo, revision)
            chosen = spec.choose(repo.id, self._client.tree(repo, commit))
        except errors.HubUnavailable as error:
            held = revision if is_commit(revision) else self.cache.commit_of(repo, revision)
            here = self._whole(repo, held, spec)
            if here is None:
                raise self._explained(error, repo, held, spec) from error
            _log.warning("hub_download.served_from_disk", repo=repo.id, reason=error.detail)
            return here
        self._prepare(repo, chosen.all, flight)
        snapshot = self.cache.snapshot(repo, commit)
        self._fetch_all(repo, commit, chosen.small, flight)
        spec.check(snapshot, repo.id)  # before the weights, so that a model that may not be loaded is not downloaded
        self._fetch_all(repo, commit, chosen.weights, flight)
        self.cache.note_commit(repo, revision, commit)
        return snapshot

    def _whole(self, repo: Repo, commit: str | None, spec: SnapshotSpec) -> Path | None:
        """Return a commit's folder if this machine has all of it, undamaged."""
        if commit is None:
            return None
        snapshot = self.cache.snapshot(repo, commit)
        return snapshot if not spec.lacking(snapshot) and not self.cache.damaged(snapshot) else None

    def _explained(
        self, error: errors.HubUnavailable, repo: Repo, commit: str | None, spec: SnapshotSpec
    ) -> errors.HubUnavailable:
        """Add to the error what is missing of a commit that is partly on this machine."""
        snapshot = self.cache.snapshot(repo, commit) if commit is not None else None
        lacking = spec.lacking(snapshot) if snapshot is not None and snapshot.is_dir() else ()
        return partly_here(error, repo, lacking) if lacking else error

    def _fetch_all(self, repo: Repo, commit: str, files: Iterable[RepoFile], flight: Flight) -> None:
        """Download files, a few at once. The first error stops the others and is raised."""
        files = tuple(files)
        failures: list[BaseException] = []

        def fetch(file: RepoFile) -> None:
            try:
                flight.check()
                self._transfer.fetch(repo, commit, file, flight)
            except BaseException as error:  # noqa: BLE001 - raised below, on the thread that asked
                failures.append(error)
                flight.stopped.set()

        for worker in start_workers(fetch, files, _WORKERS, "download-file"):
            worker.join()
        if any(isinstance(failure, errors.StorageFull) for failure in failures):
            for file in files:  # leaves space for the database and the logs
                self.cache.partial(repo, file).unlink(missing_ok=True)
        if failures:
            raise failures[0]


@singleton
def get_downloads() -> Downloads:
    """Return the process's downloads."""
    cache = HubCacheDir(hub_cache_dir, get_settings().resolved_cache_dir / "verified")
    return Downloads(get_hub_http(), get_hub_client(), cache, SystemClock())
