"""Downloads into the Hub's cache: once however many ask, resumed, checked, and stopped when nobody waits.

huggingface_hub's `snapshot_download` is not used: it begins a file anew after a break, checks lengths but no digest,
cannot be stopped, and hides a rate limit behind "not found locally".
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from core import errors
from core.clock import Clock, SystemClock
from core.files import storage_errors
from core.logging import get_logger
from core.parallel import start_workers
from core.settings import get_settings
from core.singleton import singleton
from domain.hub.repos import Repo
from domain.hub.tree import RepoFile, is_commit
from services.hub.cache_dir import HubCacheDir, Partial, hub_cache_dir
from services.hub.client import HubClient, file_path, get_hub_client
from services.hub.download_flight import DownloadCancelled, Flight, Progress
from services.hub.errors import may_pass, partly_here
from services.hub.http import HubHttp, get_hub_http
from services.hub.wanted import Wanted

if TYPE_CHECKING:
    import httpx

_WORKERS = 4  # files at once; one connection does not fill a fast line
_ATTEMPTS = 5  # in a row without as much more as this:
_PROGRESS_BYTES = 2**20
_MAX_WAIT_S = 300.0  # the Hub's rate limit windows are as long; a download has nobody to answer meanwhile
_RESERVE_BYTES = 64 * 2**20  # for the database and logs, which may be on the same device
_POLL_S = 0.1  # how soon a waiter sees progress, and that it need not wait any more
_log = get_logger(__name__)
# The repository, the revision, who asks, and what is read of it.
_Key = tuple[Repo, str, str, Wanted]


class DownloadCorrupt(errors.Unavailable):
    """What arrived is, twice in a row, not what the Hub's digest says."""

    slug, title = "download-corrupt", "Download corrupt"


class _TooLong(Exception):
    """More arrives than the Hub says that there is."""


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
        self._http, self._client, self.cache, self._clock = http, client, cache, clock
        self._sleep, self._timeout_s = sleep, timeout_s
        self._lock = threading.Lock()
        self._flights: dict[_Key, Flight] = {}

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
        flight = self._join(key)
        try:
            while True:
                done, _ = wait([flight.future], timeout=_POLL_S)
                if (progress := flight.progress()) is not None:
                    on_progress(progress)
                if done:
                    return flight.future.result()
                if cancelled():
                    raise DownloadCancelled(f"The download of {repo} was cancelled.")
        finally:
            self._leave(key, flight)

    def _join(self, key: _Key) -> Flight:
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = Flight(self._clock)
                # The context carries the request's token. A daemon, because a Hub that hangs must not keep the
                # process from ending; what has arrived is resumed.
                run = contextvars.copy_context().run
                threading.Thread(target=run, args=(self._run, key, flight), name="download", daemon=True).start()
            flight.waiting += 1
            return flight

    def _leave(self, key: _Key, flight: Flight) -> None:
        with self._lock:
            flight.waiting -= 1
            if flight.waiting == 0:
                flight.stopped.set()
                if self._flights.get(key) is flight:
                    del self._flights[key]

    def _run(self, key: _Key, flight: Flight) -> None:
        repo, revision, _, wanted = key
        try:
            flight.future.set_result(self._download(repo, revision, flight, wanted))
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is waited for
            flight.future.set_exception(error)

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
                self._fetch_file(repo, commit, file, flight)
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

    def _fetch_file(self, repo: Repo, commit: str, file: RepoFile, flight: Flight) -> None:
        blob = self.cache.blob(repo, file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.locked(repo, file, flight.check), storage_errors(blob):
            if blob.exists() and not self.cache.is_intact(blob):
                blob.unlink()
            if not blob.exists():
                with Partial(self.cache.partial(repo, file), file, flight.check) as arriving:
                    self._fill(repo, commit, file, arriving, flight)
                    arriving.move_to(blob)
                self.cache.note_verified(blob)
            flight.has(file, file.size_bytes)
            self.cache.link(repo, commit, file)

    def _fill(self, repo: Repo, commit: str, file: RepoFile, arriving: Partial, flight: Flight) -> None:
        """Download until the content matches its digest; once more from the beginning if it does not."""
        import httpx

        unreachable = (httpx.ConnectError, httpx.ConnectTimeout)
        path = file_path(repo, commit, file.path)
        for _ in range(2):
            before = arriving.size_bytes

            def progressed() -> bool:
                nonlocal before
                got_further = arriving.size_bytes >= before + _PROGRESS_BYTES
                before = arriving.size_bytes
                return got_further

            with suppress(_TooLong):
                self._http.attempt(
                    path,
                    repo,
                    lambda: self._receive(path, file, arriving, flight),
                    attempts=_ATTEMPTS,
                    max_wait_s=_MAX_WAIT_S,
                    wait=lambda seconds: self._wait(seconds, flight),
                    # Unlike for a question there is no other answer: a network that is away is waited for a while.
                    passes=lambda error: may_pass(error) or isinstance(error, unreachable),
                    progressed=progressed,
                )
                if arriving.matches():
                    return
            _log.warning("hub_download.wrong_digest", repo=repo.id, file=file.path, bytes=arriving.size_bytes)
            arriving.restart()
            flight.has(file, 0)
        raise DownloadCorrupt(f"{file.path} of {repo} arrived twice as something else than the Hub's {file.blob}.")

    def _receive(self, path: str, file: RepoFile, arriving: Partial, flight: Flight) -> None:
        """Append one answer's bytes, from where the last one broke off."""
        import httpx
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError

        if arriving.is_full:
            return
        headers = {"Accept-Encoding": "identity"}
        if arriving.size_bytes:
            headers["Range"] = f"bytes={arriving.size_bytes}-"
        flight.has(file, arriving.size_bytes)
        timeout_s = self._timeout_s or float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        try:
            with self._http.open(path, headers=headers, timeout_s=timeout_s) as response:
                if not _continues(response, arriving.size_bytes):
                    arriving.restart()
                for chunk in response.iter_bytes():
                    flight.check()
                    if arriving.size_bytes + len(chunk) > file.size_bytes:
                        raise _TooLong
                    arriving.write(chunk)
                    flight.has(file, arriving.size_bytes, len(chunk))
        except HfHubHTTPError as error:
            if error.response.status_code != httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            arriving.restart()
        if not arriving.is_full:
            raise httpx.RemoteProtocolError(f"{arriving.size_bytes} of the {file.size_bytes} bytes arrived")

    def _wait(self, seconds: float, flight: Flight) -> None:
        """Wait in small steps, so that a download nobody wants is not waited for."""
        until = self._clock.monotonic() + seconds
        while (left_s := until - self._clock.monotonic()) > 0:
            flight.check()
            self._sleep(min(left_s, 0.5))


def _continues(response: "httpx.Response", from_bytes: int) -> bool:
    """Tell whether an answer goes on where it was asked to; one that ignores the range begins at 0."""
    if response.status_code != 206:
        return from_bytes == 0
    begins = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return begins == str(from_bytes) and "Content-Encoding" not in response.headers


@singleton
def get_downloads() -> Downloads:
    """Return the process's downloads."""
    cache = HubCacheDir(hub_cache_dir, get_settings().resolved_cache_dir / "verified")
    return Downloads(get_hub_http(), get_hub_client(), cache, SystemClock())
