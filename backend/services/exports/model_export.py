"""Exports that an engine computes. It picks or loads the base, borrows it, and gives it back unchanged."""

from collections.abc import Callable
from pathlib import Path

from domain import protocol
from domain.exports import ExportResult, ExportSettings, GgufSettings
from domain.jobs.export_states import ExportKind
from domain.models.gguf import read_gguf_model
from domain.peft.algorithms import Algorithm
from domain.protocol import R
from services.adapter_service import AdapterService
from services.engines.process import CommandFailed, EngineDied, EngineProcess, death_class
from services.exports.control import ExportControl, ExportStopped
from services.loading.borrowing import borrow
from services.models.facts import ModelFacts
from services.peft_service import ConfiguredLoad, LoadedModel, PeftService
from store.records import AdapterRecord, ExportRecord


class ModelExport:
    """Makes an adapter and its base into one model.

    Args:
        oom_kills: Counts the processes that the kernel has killed for want of memory.
    """

    def __init__(
        self, peft: PeftService, adapters: AdapterService, facts: ModelFacts, oom_kills: Callable[[], int]
    ) -> None:
        self._peft, self._adapters, self._facts, self._oom_kills = peft, adapters, facts, oom_kills

    def accept(self, kind: ExportKind, adapter: AdapterRecord, settings: ExportSettings) -> None:
        """Refuse a GGUF of a base that llama.cpp does not know. The base's config alone decides.

        Raises:
            ExportRejected: The architecture, or its way of scaling positions, is not written as GGUF.
            ModelNotFound, ModelGated, HubUnavailable: The config cannot be had.
        """
        if kind is ExportKind.GGUF:
            read_gguf_model(self._facts.config(adapter.base_model_id, adapter.base_revision))

    def run(self, record: ExportRecord, folder: Path, control: ExportControl) -> ExportResult:
        """Carry an export out.

        Returns:
            The engine's description of what it made.

        Raises:
            ExportStopped: Somebody stopped it.
            AdapterDamaged: The adapter is not as it was written.
            StudioError: As loading the base says, or the engine.
        """
        adapter = self._adapters.verified(record.adapter_id)
        model = self._load(adapter)
        with borrow(model, f"exporting {record.id}", control.wait_for) as process:
            if isinstance(record.settings, GgufSettings):
                command = _export_gguf(adapter, record, record.settings, folder)
                return self._request(process, control, command)
            return self._request(process, control, _merge(adapter, record, folder))

    def _load(self, adapter: AdapterRecord) -> LoadedModel:
        """Load the base with the quantization of the training. The precision is this machine's choice."""
        algorithm = Algorithm(adapter.algorithm)
        overrides = {"quantization": adapter.config["quantization"]} if adapter.config is not None else {}
        where = self._peft.on_device(adapter.base_model_id, adapter.base_revision)
        config = self._peft.configure(algorithm, None, overrides, where).config
        return self._peft.load(ConfiguredLoad(where.model_id, where.revision, algorithm, config))

    def _request(
        self, process: EngineProcess, control: ExportControl, command: protocol.Command[R, protocol.Progress]
    ) -> R:
        control.check()
        kills = self._oom_kills()
        future = process.request(command, lambda event: control.report(event.stage, event.fraction))
        control.call_on_stop(lambda: process.stop(command.request_id))
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


def _merge(adapter: AdapterRecord, record: ExportRecord, folder: Path) -> protocol.Merge:
    return protocol.Merge(
        adapter_id=adapter.id,
        adapter_path=adapter.path,
        output_path=str(folder),
        base_model_id=adapter.base_model_id,
        about=_about(adapter, record),
    )


def _export_gguf(
    adapter: AdapterRecord, record: ExportRecord, settings: GgufSettings, folder: Path
) -> protocol.ExportGguf:
    return protocol.ExportGguf(
        adapter_id=adapter.id,
        adapter_path=adapter.path,
        output_path=str(folder),
        base_model_id=adapter.base_model_id,
        quantization=settings.quantization,
        about=_about(adapter, record),
    )


def _about(adapter: AdapterRecord, record: ExportRecord) -> protocol.AboutExport:
    return protocol.AboutExport(
        adapter_id=adapter.id,
        adapter_name=adapter.name,
        adapter_version=adapter.version,
        base_model_id=adapter.base_model_id,
        base_revision=adapter.base_revision,
        format=record.kind.value,
        created_at=record.created_at,
    )
