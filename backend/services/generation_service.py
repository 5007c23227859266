"""Text from a loaded base, with or without one of the adapters on it."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from core.errors import Rejected, StudioError
from core.logging import get_logger
from core.singleton import singleton
from domain import protocol
from domain.results import Generated
from services.adapter_service import AdapterService, get_adapter_service
from services.engines.process import CommandFailed, EngineProcess
from services.peft_service import LoadedModel, PeftService, get_peft_service
from store.records import AdapterRecord

_log = get_logger(__name__)


class AdapterOfAnotherBase(Rejected):
    """The adapter was trained on another base than the loaded one."""

    slug, title = "adapter-of-another-base", "Adapter of another base"


class GenerationRejected(Rejected):
    """The engine cannot generate what was asked for."""

    slug, title = "generation-rejected", "Generation rejected"


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
            raise

    def stop(self) -> None:
        """End the generation early, since nobody listens any more."""
        if not self.future.done():
            self.process.stop(self.command.request_id)


class GenerationService:
    """Starts generations. An adapter is put on the base when it is first asked for."""

    def __init__(self, peft: PeftService, adapters: AdapterService) -> None:
        self._peft, self._adapters = peft, adapters

    def start(
        self, model_id: str, command: protocol.Generate, on_token: Callable[[protocol.Token], None] | None = None
    ) -> Generation:
        """Start generating.

        Args:
            command: The prompt and the settings.
            on_token: Called with each piece of the text, on the engine reader's thread.

        Raises:
            LoadedModelNotFound, AdapterNotFound: There is no such model or adapter.
            AdapterOfAnotherBase: They do not belong together.
            ModelNotReady, ModelBusy: The model cannot answer now.
        """
        model = self._peft.get(model_id)
        with model.base.awaited():  # between the commands, too, it is in use
            process = model.base.engine(for_client=True)
            if command.adapter_id is not None:
                self.attach(model, command.adapter_id)
            future = process.request(command, on_token)
        future.add_done_callback(lambda _: model.base.touch())  # a long answer is no idle time
        return Generation(process, command, future)

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
    return GenerationService(get_peft_service(), get_adapter_service())
