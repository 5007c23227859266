"""Exports that an engine computes. It picks or loads the base, borrows it, and gives it back unchanged."""

from collections.abc import Callable
from pathlib import Path

from domain import protocol
from domain.exports import ExportResult, ExportSettings, GgufSettings
from domain.jobs.export_states import ExportKind
from domain.models.gguf import read_gguf_model
from domain.peft.algorithms import Algorithm
from services.adapter_service import AdapterService
from services.exports.asking import ask
from services.exports.check import ExportChecker
from services.exports.control import ExportControl
from services.loading.borrowing import borrow
from services.models.facts import ModelFacts
from services.peft_service import ConfiguredLoad, LoadedModel, PeftService
from store.records import AdapterRecord, ExportRecord


class ModelExport:
    """Makes an adapter and its base into one model.

    Args:
        peft: Loads the base.
        adapters: Has the adapter's folder.
        facts: Has the base's config.
        checker: Checks what was made.
        oom_kills: Counts the processes that the kernel has killed for want of memory.
    """

    def __init__(
        self,
        peft: PeftService,
        adapters: AdapterService,
        facts: ModelFacts,
        checker: ExportChecker,
        oom_kills: Callable[[], int],
    ) -> None:
        self._peft, self._adapters, self._facts = peft, adapters, facts
        self._checker, self._oom_kills = checker, oom_kills

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
        held = model.base.key
        with borrow(model, f"exporting {record.id}", control.wait_for) as process:
            if isinstance(record.settings, GgufSettings):
                command = _export_gguf(adapter, record, record.settings, folder)
                file = ask(process, control, command, self._oom_kills)
            else:
                merged = ask(process, control, _merge(adapter, record, folder), self._oom_kills)
        # The base is free again: where memory is short, the check has its place.
        if isinstance(record.settings, GgufSettings):
            check = self._checker.check(adapter, held, folder, file.filename, control)
            return file.model_copy(update={"check": check})
        return merged.model_copy(update={"check": self._checker.check(adapter, held, folder, None, control)})

    def _load(self, adapter: AdapterRecord) -> LoadedModel:
        """Load the base with the quantization of the training. The precision is this machine's choice."""
        algorithm = Algorithm(adapter.algorithm)
        overrides = {"quantization": adapter.config["quantization"]} if adapter.config is not None else {}
        where = self._peft.on_device(adapter.base_model_id, adapter.base_revision)
        config = self._peft.configure(algorithm, None, overrides, where).config
        return self._peft.load(ConfiguredLoad(where.model_id, where.revision, algorithm, config))


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
