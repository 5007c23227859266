"""Text from a loaded base, with or without one of the adapters on it."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from core.errors import Rejected, StudioError, Unavailable
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.results import Generated
from services.adapter_service import AdapterService, get_adapter_service
from services.engines.process import CommandFailed, EngineProcess
from services.peft_service import LoadedModel, PeftService, get_peft_service
from store.records import AdapterRecord

_log = get_logger(__name__)
# A place is free as soon as one of the answers that are being written ends.
_RETRY_AFTER_S = 5


class AdapterOfAnotherBase(Rejected):
    """The adapter was trained on another base than the loaded one."""

    slug, title = "adapter-of-another-base", "Adapter of another base"


class GenerationRejected(Rejected):
    """The engine cannot generate what was asked for."""

    slug, title = "generation-rejected", "Generation rejected"


class TooManyAnswers(Unavailable):
    """As many answers as may wait already wait on the base."""

    slug, title = "too-many-answers", "Too many answers"


class NoRoomToAnswer(Unavailable):
    """The answer does not fit into the memory that is free beside the model."""

    slug, title = "no-room-to-answer", "No room to answer"


@dataclass(frozen=True)
class Generation:
    """A generation under way."""

    process: EngineProcess
    command: protocol.Generate
    future: Future[Generated]

    def result(self) -> Generated:
        """Wait for the end.

        Raises:
            GenerationRejected: The engine refused the request.
            NoRoomToAnswer: It does not fit into memory now.
            EngineFailed: The engine failed or died.
        """
        try:
            return self.future.result()
        except CommandFailed as error:
            if error.extras["error_class"] == "bad_form" and self.command.form is not None:
                told = {"location": [self.command.form.field], "message": error.detail}
                raise GenerationRejected(error.detail, errors=[told]) from error
            if error.extras["error_class"] in ("bad_setting", "bad_model"):  # or a template that does not end
                raise GenerationRejected(error.detail) from error
            if error.extras["error_class"] == "no_room":
                raise NoRoomToAnswer(error.detail, retry_after_s=_RETRY_AFTER_S) from error
            raise

    def stop(self) -> None:
        """End the generation early, since nobody listens any more."""
        if not self.future.done():
            self.process.stop(self.command.request_id)


class GenerationService:
    """Starts generations. An adapter is put on the base when it is first asked for.

    Args:
        together: Most answers that are written at once on one base.
        waiting: Most that wait there beside them.
    """

    def __init__(self, peft: PeftService, adapters: AdapterService, *, together: int = 16, waiting: int = 64) -> None:
        self._peft, self._adapters = peft, adapters
        self._together, self._waiting = together, waiting
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()  # answers, by base

    def start(
        self, model_id: str, command: protocol.Generate, on_token: Callable[[protocol.Token], None] | None = None
    ) -> Generation:
        """Start generating, beside what is generated on the same base already.

        Args:
            command: The prompt and the settings. How much room there is is filled in here.
            on_token: Called with each piece of the text, on the engine reader's thread.

        Raises:
            LoadedModelNotFound, AdapterNotFound: There is no such model or adapter.
            AdapterOfAnotherBase: They do not belong together.
            ModelNotReady, ModelBusy: The model cannot answer now.
            TooManyAnswers: Too many wait for it already.
        """
        model = self._peft.get(model_id)
        base = model.base
        with base.awaited():  # between the commands, too, it is in use
            process = base.engine(for_client=True)
            self._enter(base.id)
            try:
                if command.adapter_id is not None:
                    self.attach(model, command.adapter_id)
                room = {"free_bytes": self._peft.free_beside(model), "most_together": self._together}
                future = process.request(command.model_copy(update=room), on_token)
            except BaseException:
                self._leave(base.id)
                raise
        future.add_done_callback(lambda _: self._leave(base.id))
        future.add_done_callback(lambda _: base.touch())  # a long answer is no idle time
        return Generation(process, command, future)

    def _enter(self, base_id: str) -> None:
        with self._lock:
            if self._under_way[base_id] >= self._together + self._waiting:
                raise TooManyAnswers(
                    f"{self._together} answers are written on this model, and {self._waiting} wait: try again later.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._under_way[base_id] += 1

    def _leave(self, base_id: str) -> None:
        with self._lock:
            self._under_way[base_id] -= 1
            if not self._under_way[base_id]:
                del self._under_way[base_id]

    def attach_when_ready(self, model: LoadedModel, adapter_id: str) -> None:
        """Put an adapter on a base now, or as soon as the base has loaded. It is then among the model's `adapters`.

        Raises:
            AdapterNotFound, AdapterOfAnotherBase: It can never be put there.
        """
        self._check(model, adapter_id)
        loading = model.base.loading
        if loading is None or loading.done():
            self.attach(model, adapter_id)
        else:
            loading.add_done_callback(lambda _: self._attach_loaded(model, adapter_id))

    def _attach_loaded(self, model: LoadedModel, adapter_id: str) -> None:
        if not model.base.usable:
            return  # the load failed; the loaded model says why
        try:
            self.attach(model, adapter_id)
        except StudioError as error:
            _log.warning("adapter.not_attached", adapter_id=adapter_id, model_id=model.id, error=error.detail)

    def attach(self, model: LoadedModel, adapter_id: str) -> None:
        """Put an adapter on a loaded base, if it is not there already."""
        self._peft.attach(model, adapter_id, Path(self._check(model, adapter_id).path))

    def _check(self, model: LoadedModel, adapter_id: str) -> AdapterRecord:
        record = self._adapters.get(adapter_id)
        if record.base_model_id != model.model_id:
            raise AdapterOfAnotherBase(f"The adapter belongs to {record.base_model_id}, not to {model.model_id}.")
        return record


@singleton
def get_generation_service() -> GenerationService:
    """Return the process's generation service."""
    settings = get_settings()
    return GenerationService(
        get_peft_service(),
        get_adapter_service(),
        together=settings.answers_together,
        waiting=settings.answers_waiting,
    )
