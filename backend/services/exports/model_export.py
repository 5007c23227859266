"""Exports that an engine computes: the base is found or loaded, lent, and given back as it was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from domain import protocol
from domain.jobs.export_states import ExportKind
from domain.models.gguf import read_gguf_model
from domain.peft.algorithms import Algorithm
from services.adapter_service import AdapterService
from services.engines.process import CommandFailed, EngineDied, EngineProcess, death_class
from services.exports.control import ExportControl, ExportStopped
from services.loading.borrowing import borrow
from services.models.facts import ModelFacts
from services.peft_service import ConfiguredLoad, LoadedModel, PeftService
from store.records import AdapterRecord, ExportRecord


class ModelExport:
    """Makes one model of an adapter and its base.

    Args:
        oom_kills: Counts the processes that the kernel has killed for want of memory.
    """

    def __init__(
        self, peft: PeftService, adapters: AdapterService, facts: ModelFacts, oom_kills: Callable[[], int]
    ) -> None:
        self._peft, self._adapters, self._facts, self._oom_kills = peft, adapters, facts, oom_kills

    def accept(self, kind: ExportKind, adapter: AdapterRecord, settings: Mapping[str, Any]) -> None:
        """Refuse what llama.cpp has no place for, by the base's config alone.

        Raises:
            ExportRejected: The architecture, or how it scales positions, is not written as GGUF.
            ModelNotFound, ModelGated, HubUnavailable: The config cannot be had.
        """
        if kind is ExportKind.GGUF:
            read_gguf_model(self._facts.config(adapter.base_model_id, adapter.base_revision))

    def run(self, record: ExportRecord, folder: Path, control: ExportControl) -> dict[str, Any]:
        """Carry an export out.

        Returns:
            What the engine says of what it made.

        Raises:
            ExportStopped: Somebody stopped it.
            AdapterDamaged: The adapter is not as it was written.
            StudioError: As loading the base says, or the engine.
        """
        adapter = self._adapters.verified(record.adapter_id)
        model = self._load(adapter)
        with borrow(model, f"exporting {record.id}", control.wait_for) as process:
            return self._request(process, control, lambda request_id: _command(request_id, adapter, record, folder))

    def _load(self, adapter: AdapterRecord) -> LoadedModel:
        """Load the base as it was held in the training; how precisely it computes is this machine's to choose."""
        algorithm = Algorithm(adapter.algorithm)
        overrides = {"quantization": adapter.config["quantization"]} if adapter.config is not None else {}
        where = self._peft.on_device(adapter.base_model_id, adapter.base_revision)
        config = self._peft.configure(algorithm, None, overrides, where).config
        return self._peft.load(ConfiguredLoad(where.model_id, where.revision, algorithm, config))

    def _request(self, process: EngineProcess, control: ExportControl, command: Callable[[str], Any]) -> dict[str, Any]:
        def on_event(event: Any) -> None:
            if isinstance(event, protocol.Progress):
                control.report(event.stage, event.fraction)

        control.check()
        kills = self._oom_kills()
        request_id, future = process.request(command, on_event)
        control.call_on_stop(lambda: process.stop(request_id))
        try:
            return future.result()
        except CommandFailed as error:
            if error.extras["error_class"] == "cancelled":
                raise ExportStopped("The export was stopped.") from error
            raise
        except EngineDied as error:
            control.check()  # the server ends, and its engines with it
            error.extras["error_class"] = death_class(error, out_of_memory=self._oom_kills() > kills)
            raise


def _command(
    request_id: str, adapter: AdapterRecord, record: ExportRecord, folder: Path
) -> protocol.Merge | protocol.ExportGguf:
    values: dict[str, Any] = {
        "request_id": request_id,
        "adapter_id": adapter.id,
        "adapter_path": adapter.path,
        "output_path": str(folder),
        "base_model_id": adapter.base_model_id,
        "about": {
            "adapter_id": adapter.id,
            "adapter_name": adapter.name,
            "adapter_version": adapter.version,
            "base_model_id": adapter.base_model_id,
            "base_revision": adapter.base_revision,
            "format": record.kind.value,
            "created_at": record.created_at,
        },
    }
    if record.kind is ExportKind.GGUF:
        return protocol.ExportGguf(**values, quantization=record.settings["quantization"])
    return protocol.Merge(**values)
