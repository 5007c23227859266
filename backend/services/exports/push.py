"""Pushes an adapter to the Hub: an upload that shows its progress and can be stopped."""

import contextvars
import io
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import AccessDenied, StudioError
from core.files import plain_files
from domain.exports import ExportSettings, PushedAdapter, PushSettings
from domain.jobs.export_states import ExportKind
from domain.models.records import check_model_id
from services.adapter_service import AdapterService
from services.exports.control import ExportControl
from services.hub.errors import unavailable
from services.hub.http import hub_token, is_offline, request_token
from services.hub.uploads import HubUploads
from store.records import AdapterRecord, ExportRecord

_POLL_S = 0.2


class HubPush:
    """Uploads an adapter's folder as one commit.

    Args:
        adapters: Has the adapter's folder.
        hub: Uploads it.
    """

    def __init__(self, adapters: AdapterService, hub: HubUploads) -> None:
        self._adapters, self._hub = adapters, hub

    def accept(self, kind: ExportKind, adapter: AdapterRecord, settings: ExportSettings) -> None:
        """Refuse a push that cannot succeed.

        Raises:
            ModelRejected: The id is no repository's.
            HubUnavailable: HF_HUB_OFFLINE is set.
            AccessDenied: There is no token.
        """
        check_model_id(_of_a_push(settings).repo_id)
        if is_offline():
            raise unavailable("HF_HUB_OFFLINE is set: nothing is pushed.")
        if hub_token() is None:
            raise AccessDenied("A push needs a token that may write: X-HF-Token for this request, or HF_TOKEN.")

    def run(self, record: ExportRecord, folder: Path, control: ExportControl) -> PushedAdapter:
        """Push.

        The upload runs on a thread of its own, so that a Hub which hangs does not hold up whoever stops the push. An
        upload that was stopped ends at the next byte that it reads, and always before its commit.

        Raises:
            ExportStopped: Somebody stopped it, and nothing was committed.
            AdapterDamaged: The adapter is not as it was written.
            AccessDenied, ModelNotFound, HubUnavailable, PushRejected: As the Hub says.
        """
        adapter = self._adapters.verified(record.adapter_id)
        settings = _of_a_push(record.settings)
        if settings.token == "request" and request_token.get() is None:  # noqa: S105 - says whose it is
            raise AccessDenied("The token came with the request and went with it when the server ended: push again.")
        upload = _Upload(adapter, settings, self._hub, control)
        future: Future[PushedAdapter] = Future()
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(_settle, future, upload.run), name="hub-push", daemon=True).start()
        while not future.done():
            if upload.committing.is_set():
                return future.result()  # the commit may be made already, so a stop comes too late
            control.wait(_POLL_S)
        return future.result()


def _of_a_push(settings: ExportSettings) -> PushSettings:
    if not isinstance(settings, PushSettings):
        raise TypeError(f"A push has the settings of another export: {settings!r}.")
    return settings


def _settle(future: Future[PushedAdapter], work: Callable[[], PushedAdapter]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised again where the result is waited for
        future.set_exception(error)


class _Upload:
    """One push under way."""

    def __init__(self, adapter: AdapterRecord, settings: PushSettings, hub: HubUploads, control: ExportControl) -> None:
        self._adapter, self._settings, self._hub, self._control = adapter, settings, hub, control
        self.committing = threading.Event()
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._total_bytes = 1

    def run(self) -> PushedAdapter:
        """Make the repository, upload what is large, commit."""
        message = f"Upload the adapter {self._adapter.name}, version {self._adapter.version}"
        try:
            self._control.report("making the repository", None)
            repo_id = self._hub.make_repository(self._settings.repo_id, private=self._settings.private)
            with ExitStack() as opened:
                commit = self._hub.commit(repo_id, self._files(opened), message, self._before_commit)
        except StudioError:
            self._control.check()  # a stop may come back as another error
            raise
        return PushedAdapter(repo_id=repo_id, commit=commit, url=self._hub.url(repo_id))

    def _before_commit(self) -> None:
        self._control.check()
        self.committing.set()
        self._control.report("committing", None)

    def _files(self, opened: ExitStack) -> dict[str, BinaryIO]:
        """Open the adapter's files. They count the bytes that are read."""
        files = plain_files(Path(self._adapter.path))
        # Each is read twice: once for its sum, and once to be sent.
        self._total_bytes = max(1, 2 * sum(path.stat().st_size for _, path in files))
        # An open file and not a path: it shows progress, can be stopped, and is sent over plain HTTP.
        return {
            name: opened.enter_context(io.BufferedReader(_Counted(path, self._count), 2**20)) for name, path in files
        }

    def _count(self, size: int) -> None:
        self._control.check()
        with self._lock:  # several files are sent at once
            self._read_bytes += size
            fraction = min(1.0, self._read_bytes / self._total_bytes)
        if not self.committing.is_set():
            self._control.report("uploading", fraction)


class _Counted(io.RawIOBase):
    """A file that reports the bytes of each read."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        self._file = path.open("rb", buffering=0)
        self._count = count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer) or 0
        self._count(size)
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
