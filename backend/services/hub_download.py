"""Downloads a model's files into the Hub cache, with progress, through huggingface_hub."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# state of a load (downloading or loading), fraction, downloaded bytes, total bytes
LoadProgress = Callable[[str, float | None, int | None, int | None], None]


def download_snapshot(model_id: str, revision: str | None, patterns: list[str], on_progress: LoadProgress) -> Path:
    """Return the snapshot's folder in HF_HOME, downloading what is missing.

    Raises:
        ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from services.hub_client import map_hub_error

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.onnx"],
                tqdm_class=_progress_bar(on_progress),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise map_hub_error(error, model_id) from error


def _progress_bar(on_progress: LoadProgress) -> Any:
    """Make a tqdm class that reports bytes over all files instead of drawing."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    done: dict[int, tuple[float, float]] = {}

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
            self._is_bytes = kwargs.get("unit") == "B"
            self._report(float(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            self._report(n or 0)
            return None

        def _report(self, added: float) -> None:
            if not self._is_bytes:
                return
            with lock:
                before = done.get(id(self), (0.0, 0.0))[0]
                done[id(self)] = (before + added, float(self.total or 0))
                finished = int(sum(part for part, _ in done.values()))
                total = int(sum(whole for _, whole in done.values()))
            on_progress("downloading", min(1.0, finished / total) if total else None, finished, total or None)

    return ByteCounter
