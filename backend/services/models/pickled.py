"""Pickled weights, where a client asked for them: turned into safetensors once, in an engine of its own."""

import shutil
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

from core.errors import ModelRejected, StorageFull
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.models.load_files import pickled_weights
from services.engines.process import CommandFailed, EngineProcess
from services.hub.download_flight import DownloadCancelled

_POLL_S = 0.1
_log = get_logger(__name__)


class PickledModels:
    """Converts them. What is converted lies where the registry finds prepared models, and needs no leave any more.

    Args:
        cache_dir: `models/` below it holds the finished folders.
        log_dir: Where the engine's log goes.
    """

    def __init__(self, cache_dir: Path, log_dir: Path) -> None:
        self._models_dir, self._log_dir = cache_dir / "models", log_dir

    def convert(
        self,
        model_id: str,
        source: Path,
        on_progress: Callable[[float | None], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        """Return a folder with the same model in safetensors.

        Args:
            model_id: Which model.
            source: The folder with `pytorch_model.bin`, or its shards.
            on_progress: Takes the fraction that is done.
            cancelled: Asked now and then.

        Raises:
            ModelRejected: The files hold something else than weights; nothing of it was run.
            StorageFull: There is no room for the copy.
            DownloadCancelled: `cancelled` said so.
        """
        from filelock import FileLock  # a dependency of huggingface_hub; 20 ms that most starts do not need

        output = self._models_dir / model_id.replace("/", "--", 1)
        self._models_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{output}.lock"):
            if (output / "config.json").is_file():
                return output
            self._require_space(source)
            engine = EngineProcess(self._log_dir / "engine-prepare.log")
            try:
                command = protocol.PreparePickled(source_path=str(source), output_path=str(output), model_id=model_id)
                future = engine.request(command, lambda event: on_progress(event.fraction))
                while not wait([future], timeout=_POLL_S).done:
                    if cancelled():
                        engine.kill()
                        raise DownloadCancelled(f"The conversion of {model_id} was cancelled.")
                future.result()
            except CommandFailed as error:
                raise ModelRejected(error.detail) from error
            finally:
                engine.close()
        _log.info("pickled_model.converted", model_id=model_id, path=str(output))
        return output

    def _require_space(self, source: Path) -> None:
        needed = sum((source / name).stat().st_size for name in pickled_weights(path.name for path in source.iterdir()))
        free = shutil.disk_usage(self._models_dir).free
        if free < needed:
            raise StorageFull(
                f"The copy in safetensors needs {needed} bytes; the device of {self._models_dir} has {free} free.",
                needed_bytes=needed,
                free_bytes=free,
            )


@singleton
def get_pickled_models() -> PickledModels:
    """Return the process's converter."""
    settings = get_settings()
    return PickledModels(settings.resolved_cache_dir, settings.home / "logs")
