"""Downloads one file into the Hub's cache. A broken download is resumed, and the content is checked by its digest."""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from core import errors
from core.clock import Clock
from core.files import storage_errors
from core.logging import get_logger
from domain.hub.repos import Repo
from domain.hub.tree import RepoFile
from services.hub.cache_dir import HubCacheDir, Partial
from services.hub.client import file_path
from services.hub.download_flight import Flight
from services.hub.errors import may_pass
from services.hub.http import HubHttp

if TYPE_CHECKING:
    import httpx

_ATTEMPTS = 5  # failures in a row, none of which brought as much as this:
_PROGRESS_BYTES = 2**20
_MAX_WAIT_S = 300.0  # as long as the Hub's rate limit windows; no client waits for an answer meanwhile
_log = get_logger(__name__)


class DownloadCorrupt(errors.Unavailable):
    """Two downloads in a row do not match the digest that the Hub names."""

    slug, title = "download-corrupt", "Download corrupt"


class _TooLong(Exception):
    """The answer is longer than the Hub said."""


class FileTransfer:
    """Downloads single files into the cache.

    Args:
        http: Sends the requests.
        cache: Holds the files.
        clock: Measures waits.
        sleep: Waits between attempts.
        timeout_s: Seconds to wait for the next bytes; HF_HUB_DOWNLOAD_TIMEOUT by default.
    """

    def __init__(
        self, http: HubHttp, cache: HubCacheDir, clock: Clock, sleep: Callable[[float], None], timeout_s: float | None
    ) -> None:
        self._http, self._cache, self._clock = http, cache, clock
        self._sleep, self._timeout_s = sleep, timeout_s

    def fetch(self, repo: Repo, commit: str, file: RepoFile, flight: Flight) -> None:
        """Put a file into a commit's folder. It is downloaded only if the cache lacks its content.

        Raises:
            DownloadCorrupt: The content does not match the digest that the Hub names.
            DownloadCancelled: Nobody waits any more.
            StorageFull: The device cannot hold it.
            NotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        blob = self._cache.blob(repo, file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.locked(repo, file, flight.check), storage_errors(blob):
            if blob.exists() and not self._cache.is_intact(blob):
                blob.unlink()
            if not blob.exists():
                with Partial(self._cache.partial(repo, file), file, flight.check) as arriving:
                    self._fill(repo, commit, file, arriving, flight)
                    arriving.move_to(blob)
                self._cache.note_verified(blob)
            flight.has(file, file.size_bytes)
            self._cache.link(repo, commit, file)

    def _fill(self, repo: Repo, commit: str, file: RepoFile, arriving: Partial, flight: Flight) -> None:
        """Download a file and check its digest. If it does not match, download it once more from the beginning."""
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
                    # A cached answer cannot replace a file, so a network that is down is waited for.
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
        """Append the bytes of one answer. It starts where the last one broke off."""
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
        """Wait in small steps, so that the wait ends soon after the last caller has left."""
        until = self._clock.monotonic() + seconds
        while (left_s := until - self._clock.monotonic()) > 0:
            flight.check()
            self._sleep(min(left_s, 0.5))


def _continues(response: "httpx.Response", from_bytes: int) -> bool:
    """Tell whether an answer starts at the byte that was asked for. A server that ignores the range starts at 0."""
    if response.status_code != 206:
        return from_bytes == 0
    begins = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return begins == str(from_bytes) and "Content-Encoding" not in response.headers
