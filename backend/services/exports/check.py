"""What an export made is compared with base and adapter before it is called succeeded, in an engine of its own."""

import os
from collections.abc import Callable
from pathlib import Path

from core.errors import DoesNotFit, EngineFailed, StudioError
from core.logging import get_logger
from domain.exports import ExportCheck
from domain.protocol import CheckExport
from services.engines.warm import Engines
from services.exports.asking import ask
from services.exports.control import ExportControl, ExportStopped
from services.loading.base_request import BaseKey
from services.models.files import ModelFiles
from services.peft_service import PeftService
from store.records import AdapterRecord

# Ends the names of folders whose export did not pass its check.
SET_ASIDE = "-not-checked"
_LIBRARIES_BYTES = 2**30  # what an engine takes for itself and for the answers
_POLL_S = 2.0
_PATIENCE_S = 300.0  # for idle models to give their memory up
_SUGGESTIONS = ["look at the files that were kept; then delete the export, which deletes them", "report it as a fault"]
_log = get_logger(__name__)


class ExportNotProven(EngineFailed):
    """What an export wrote is not what base and adapter make, or could not be compared with it.

    `kept_path` is the folder that has it.
    """

    slug, title = "export-not-proven", "Export not proven"


class ExportChecker:
    """Checks exports.

    Args:
        peft: Gives room in memory.
        files: Has the base's files.
        engines: Gives the engine that compares.
        oom_kills: Counts the processes that the kernel has killed for want of memory.
        log_dir: Where the engine writes.
        engine_silence_s: An engine that is silent for this long is ended.
    """

    def __init__(
        self,
        peft: PeftService,
        files: ModelFiles,
        engines: Engines,
        oom_kills: Callable[[], int],
        *,
        log_dir: Path,
        engine_silence_s: float,
    ) -> None:
        self._peft, self._files, self._engines, self._oom_kills = peft, files, engines, oom_kills
        self._log_dir, self._engine_silence_s = log_dir, engine_silence_s

    def check(
        self, adapter: AdapterRecord, held: BaseKey, folder: Path, gguf_file: str | None, control: ExportControl
    ) -> ExportCheck:
        """Compare what an export wrote with base and adapter; set it aside if it is not the same.

        Args:
            adapter: The adapter.
            held: How the engine that wrote it held the base.
            folder: The export's folder.
            gguf_file: The file's name, if it is one.
            control: Of the export.

        Raises:
            ExportStopped: Somebody stopped the export.
            ExportNotProven: It is not the same, or could not be compared. Its files are kept beside the others.
        """
        control.report("checking", None)
        try:
            return self._compare(adapter, held, folder, gguf_file, control)
        except ExportStopped:
            raise
        except StudioError as error:
            kept = folder.with_name(f"{folder.name}{SET_ASIDE}")
            os.replace(folder, kept)
            error_class = error.extras.get("error_class") or error.slug.replace("-", "_")
            _log.error("export.not_proven", export=folder.name, error=error.detail)
            extras = error.extras | {
                "error_class": error_class,
                "suggestions": error.extras.get("suggestions") or _SUGGESTIONS,
            }
            raise ExportNotProven(
                f"The export did not pass its check: {error.detail.rstrip('.')}. Its files are kept in {kept}.",
                **extras,
                kept_path=str(kept),
            ) from error

    def _compare(
        self, adapter: AdapterRecord, held: BaseKey, folder: Path, gguf_file: str | None, control: ExportControl
    ) -> ExportCheck:
        base = self._files.ensure(
            adapter.base_model_id, adapter.base_revision, lambda *_: None, lambda: control.cancelled
        )
        self._wait_for_room(_needed_bytes(base, held), control)
        command = CheckExport.model_validate(
            {
                "base_path": str(base),
                "adapter_path": adapter.path,
                "export_path": str(folder),
                "gguf_file": gguf_file,
                "precision": held.precision,
                "quantization": held.quantization,
                "rounded_elsewhere": held.quantization != "none" and held.device != "cpu",
            }
        )
        process = self._engines.take(self._log_dir / "engine-check.log", silence_s=self._engine_silence_s)
        try:
            # It holds nothing that anybody else needs: a stop ends it at once, in the middle of a load too.
            return ask(process, control, command, self._oom_kills, process.kill)
        finally:
            process.close()

    def _wait_for_room(self, needed_bytes: int, control: ExportControl) -> None:
        """Wait until what the check loads fits the host's memory.

        Raises:
            DoesNotFit: It does not, for all that idle models gave up.
            ExportStopped: Somebody stopped the export.
        """
        waited_s = 0.0
        while True:
            free = self._peft.make_room("the check of an export", needed_bytes)
            if free is None or needed_bytes <= free:
                return
            if waited_s >= _PATIENCE_S:
                raise DoesNotFit(
                    f"it could not be compared, because the check takes about {needed_bytes} bytes of memory, and "
                    f"{free} are free",
                    suggestions=["unload other models and export again"],
                )
            control.report("waiting for memory to check it", None)
            control.wait(_POLL_S)
            waited_s += _POLL_S


def _needed_bytes(base: Path, held: BaseKey) -> int:
    """Return what a check holds at most: the base as its files have it, or one that was in few bits, unpacked."""
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    unpacked = held.quantization != "none" and held.precision == "fp32"
    return stored * (2 if unpacked else 1) + _LIBRARIES_BYTES
