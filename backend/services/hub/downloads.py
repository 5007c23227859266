"""Downloads into the Hub's cache: once however many ask, resumed, checked, and stopped when nobody waits.

huggingface_hub's `snapshot_download` is not used: it begins a file anew after a break, checks lengths but no digest,
cannot be stopped, and hides a rate limit behind "not found locally".
"""

import time
from collections.abc import Callable, Iterable
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
from services.hub.wanted import Wanted

_WORKERS = 4  # files at once; one connection does not fill a fast line
_RESERVE_BYTES = 64 * 2**20  # for the database and logs, which may be on the same device
_log = get_logger(__name__)


class Downloads:
    """Brings what is in repositories onto this machine.

    Args:
        http: Sends the requests for files.
        client: Tells commits and trees.
        cache: Where files go.
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
        wanted: Wanted,
    ) -> Path:
        """Return the snapshot's folder with everything a load reads, each file's content checked.

        Args:
            repo: Which repository.
            revision: Branch, tag or commit; `main` if None.
            on_progress: Called on this thread about ten times a second.
            cancelled: Asked as often; the download itself stops when the last who waits has left.
            wanted: What is read of it.

        Raises:
            Rejected: The kind's own. The id cannot be one, or the repository is not fit to be read.
            NeedsRemoteCode, NoSafeWeights: It could not be loaded safely; no weights were downloaded.
            StorageFull: The device cannot hold it; nothing was downloaded.
            DownloadCorrupt: What arrives is not what the Hub says that it has.
            DownloadCancelled: `cancelled` said so.
            NotFound, AccessDenied, HubUnavailable: As the Hub says, and it is not here either.
        """
        repo.check(revision)
        key = (repo, revision or "main", self._http.identity, wanted)
        return self._flights.join(
            key,
            repo.id,
            lambda flight: self._download(repo, revision or "main", flight, wanted),
            on_progress,
            cancelled,
        )

    def _download(self, repo: Repo, revision: str, flight: Flight, wanted: Wanted) -> Path:
        here = self._whole(repo, revision if is_commit(revision) else None, wanted)
        if here is not None:
            return here
        try:
            commit = revision if is_commit(revision) else self._client.commit(repo, revision)
            chosen = wanted.choose(repo.id, self._client.tree(repo, commit))
        except errors.HubUnavailable as error:
            held = revision if is_commit(revision) else self.cache.commit_of(repo, revision)
            here = self._whole(repo, held, wanted)
            if here is None:
                raise self._explained(error, repo, held, wanted) from error
            _log.warning("hub_download.served_from_disk", repo=repo.id, reason=error.detail)
            return here
        flight.total_bytes = sum(file.size_bytes for file in chosen.all)
        missing = sum(self.cache.missing_bytes(repo, file) for file in chosen.all)
        self.cache.require_space(missing, _RESERVE_BYTES)
        snapshot = self.cache.snapshot(repo, commit)
        self._fetch_all(repo, commit, chosen.small, flight)
        wanted.check(snapshot, repo.id)  # before the weights: what may not be loaded is not downloaded
        self._fetch_all(repo, commit, chosen.weights, flight)
        self.cache.note_commit(repo, revision, commit)
        return snapshot

    def _whole(self, repo: Repo, commit: str | None, wanted: Wanted) -> Path | None:
        """Return a commit's folder if it is on this machine, whole and undamaged."""
        if commit is None:
            return None
        snapshot = self.cache.snapshot(repo, commit)
        return snapshot if not wanted.lacking(snapshot) and not self.cache.damaged(snapshot) else None

    def _explained(
        self, error: errors.HubUnavailable, repo: Repo, commit: str | None, wanted: Wanted
    ) -> errors.HubUnavailable:
        """Say beside it what is missing of a commit that is on this machine in part."""
        snapshot = self.cache.snapshot(repo, commit) if commit is not None else None
        lacking = wanted.lacking(snapshot) if snapshot is not None and snapshot.is_dir() else ()
        return partly_here(error, repo, lacking) if lacking else error

    def _fetch_all(self, repo: Repo, commit: str, files: Iterable[RepoFile], flight: Flight) -> None:
        """Fetch files, a few at once; the first error stops the others and is raised."""
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
            for file in files:  # room for what keeps the service going
                self.cache.partial(repo, file).unlink(missing_ok=True)
        if failures:
            raise failures[0]


@singleton
def get_downloads() -> Downloads:
    """Return the process's downloads."""
    cache = HubCacheDir(hub_cache_dir, get_settings().resolved_cache_dir / "verified")
    return Downloads(get_hub_http(), get_hub_client(), cache, SystemClock())
