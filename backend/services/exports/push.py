"""Pushes an adapter to the Hub with huggingface_hub's own functions, seen and stopped from outside."""

import contextvars
import io
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import AccessDenied, Rejected, StudioError
from core.files import plain_files
from domain.exports import ExportSettings, PushedAdapter, PushSettings
from domain.hub.repos import model_repo
from domain.jobs.export_states import ExportKind
from domain.models.records import check_model_id
from services.adapter_service import AdapterService
from services.exports.control import ExportControl
from services.hub.errors import map_hub_error, unavailable
from services.hub.http import hub_token, is_offline, request_token
from store.records import AdapterRecord, ExportRecord

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_POLL_S = 0.2


class PushRejected(Rejected):
    """The Hub, or what is there already, does not allow the push as it stands."""

    slug, title = "push-rejected", "Push rejected"


class HubPush:
    """Uploads an adapter's folder as one commit.

    Args:
        endpoint: The Hub's URL.
    """

    def __init__(self, adapters: AdapterService, endpoint: str) -> None:
        self._adapters, self._endpoint = adapters, endpoint

    def accept(self, kind: ExportKind, adapter: AdapterRecord, settings: ExportSettings) -> None:
        """Refuse a push that nobody may make.

        Raises:
            ModelRejected: The id cannot be one.
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

        huggingface_hub sets no time limit, so that a Hub which hangs would hold this thread for ever: the upload runs
        on another. One that was stopped ends at the next byte that it reads, and always before its commit.

        Raises:
            ExportStopped: Somebody stopped it, and nothing was committed.
            AdapterDamaged: The adapter is not as it was written.
            AccessDenied, ModelNotFound, HubUnavailable, PushRejected: As the Hub says.
        """
        adapter = self._adapters.verified(record.adapter_id)
        settings = _of_a_push(record.settings)
        if settings.token == "request" and request_token.get() is None:  # noqa: S105 - says whose it is
            raise AccessDenied("The token came with the request and went with it when the server ended: push again.")
        upload = _Upload(adapter, settings, self._endpoint, hub_token(), control)
        future: Future[PushedAdapter] = Future()
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(_settle, future, upload.run), name="hub-push", daemon=True).start()
        while not future.done():
            if upload.committing.is_set():
                return future.result()  # it may have taken place already: the Hub's answer decides
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

    def __init__(
        self,
        adapter: AdapterRecord,
        settings: PushSettings,
        endpoint: str,
        token: str | None,
        control: ExportControl,
    ) -> None:
        self._adapter, self._settings, self._endpoint = adapter, settings, endpoint
        self._token, self._control = token, control
        self.committing = threading.Event()
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._total_bytes = 1

    def run(self) -> PushedAdapter:
        """Make the repository, upload what is large, commit."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
        api = HfApi(endpoint=self._endpoint, token=self._token)
        repo_id = self._settings.repo_id
        files: list[_Counted] = []
        try:
            self._control.report("making the repository", None)
            repo_id = self._make_repository(api)
            additions = self._additions(files)
            api.preupload_lfs_files(repo_id, additions, free_memory=False)
            self._control.check()
            self.committing.set()
            self._control.report("committing", None)
            commit = api.create_commit(
                repo_id,
                additions,
                commit_message=f"Upload the adapter {self._adapter.name}, version {self._adapter.version}",
            )
        except StudioError:
            raise
        except Exception as error:
            self._control.check()  # a stop comes back wrapped in whatever was being done
            raise _mapped(error, repo_id) from error
        finally:
            for file in files:
                file.close()
        return PushedAdapter(repo_id=repo_id, commit=commit.oid, url=f"{self._endpoint}/{repo_id}")

    def _make_repository(self, api: "HfApi") -> str:
        """Make the repository, or take the one that is there if it is as private as wanted.

        Raises:
            PushRejected: It is there and more public, or more private.
        """
        from huggingface_hub.errors import HfHubHTTPError

        wanted, private = self._settings.repo_id, self._settings.private
        try:
            return str(api.create_repo(wanted, private=private).repo_id)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
        found = api.model_info(wanted)
        if bool(found.private) != private:
            state = "private" if found.private else "public"
            raise PushRejected(
                f"{found.id} is there already and {state}; push with private={str(found.private).lower()}."
            )
        return str(found.id)

    def _additions(self, files: "list[_Counted]") -> "list[CommitOperationAdd]":
        from huggingface_hub import CommitOperationAdd

        found = plain_files(Path(self._adapter.path))
        # Each is read twice: once for its sum, and once to be sent.
        self._total_bytes = max(1, 2 * sum(path.stat().st_size for _, path in found))
        additions = []
        for name, path in found:
            # A file that counts, and not a path: it shows progress, stops when told, and goes over plain HTTP.
            files.append(_Counted(path, self._count))
            additions.append(CommitOperationAdd(name, io.BufferedReader(files[-1], 2**20)))
        return additions

    def _count(self, size: int) -> None:
        self._control.check()
        with self._lock:  # several files are sent at once
            self._read_bytes += size
            fraction = min(1.0, self._read_bytes / self._total_bytes)
        if not self.committing.is_set():
            self._control.report("uploading", fraction)


class _Counted(io.RawIOBase):
    """A file that tells how much of it is read, whenever it is."""

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


def _mapped(error: Exception, repo_id: str) -> StudioError:
    """Turn what huggingface_hub raises into this service's terms; an upload hides the Hub's answer in a cause."""
    cause: BaseException | None = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError):
        return PushRejected(f"{repo_id}: {str(cause)[:500]}")
    return map_hub_error(cause if isinstance(cause, Exception) else error, model_repo(repo_id))
