"""Models that are on this machine: the embedded one, the model folders, the Hub cache."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.logging import get_logger
from domain.model_records import ModelSummary
from domain.safetensors_header import parameters_by_dtype

_log = get_logger(__name__)


@dataclass(frozen=True)
class LocalModel:
    """A model with where it is; `path` is None for the embedded model before it is prepared."""

    summary: ModelSummary
    path: Path | None
    config: dict[str, Any]


class LocalModels:
    """Looks again at every call: folders change under a running server.

    Args:
        folders: Hold models as `name/` or `owner/name/`.
        embedded: The model that needs no Hub.
    """

    def __init__(self, folders: tuple[Path, ...], embedded: Callable[[], LocalModel | None]) -> None:
        self._folders, self._embedded = folders, embedded

    def all(self) -> list[LocalModel]:
        """Return every model once; the embedded one first, then the folders, then the Hub cache."""
        found: dict[str, LocalModel] = {}
        for model in (*filter(None, (self._embedded(),)), *self._in_folders(), *_in_hub_cache()):
            found.setdefault(model.summary.model_id, model)
        return list(found.values())

    def find(self, model_id: str) -> LocalModel | None:
        """Return the model of that id, or None."""
        return next((model for model in self.all() if model.summary.model_id == model_id), None)

    def local_path(self, model_id: str) -> Path | None:
        """Return the model's folder, or None."""
        model = self.find(model_id)
        return model.path if model is not None else None

    def _in_folders(self) -> Iterator[LocalModel]:
        for root in self._folders:
            for config in (*sorted(root.glob("*/config.json")), *sorted(root.glob("*/*/config.json"))):
                # A link that leads out of the folder would let a name reach any file of the machine.
                if config.resolve().is_relative_to(root.resolve()):
                    model = read_model(config.parent, config.parent.relative_to(root).as_posix())
                    if model is not None:
                        yield model


def _in_hub_cache() -> Iterator[LocalModel]:
    from huggingface_hub import constants

    for repository in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        reference = repository / "refs" / "main"
        if not reference.is_file():
            continue
        snapshot = repository / "snapshots" / reference.read_text(encoding="utf-8").strip()
        model_id = repository.name.removeprefix("models--").replace("--", "/")
        if (snapshot / "config.json").is_file() and (model := read_model(snapshot, model_id)) is not None:
            yield model


def read_model(folder: Path, model_id: str) -> LocalModel | None:
    """Read a model's folder; None, with a line in the log, where it is not one."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return None
    try:
        config = json.loads((folder / "config.json").read_bytes())
        counts = [_count(file) for file in weights]
    except (OSError, ValueError) as error:
        _log.warning("local_model.unreadable", folder=str(folder), error=str(error))
        return None
    if not isinstance(config, dict):
        return None
    architectures = config.get("architectures") or [None]
    summary = ModelSummary(
        model_id=model_id,
        author=model_id.split("/")[0] if "/" in model_id else None,
        downloads=None,
        likes=None,
        task="text-generation" if str(architectures[0]).endswith("ForCausalLM") else None,
        library="transformers",
        tags=(),
        license=None,
        gated=None,
        parameters=sum(sum(count.values()) for count in counts),
        size_bytes=sum(file.stat().st_size for file in weights),
        architecture=architectures[0],
        created_at=None,
        modified_at=None,
        local=True,
    )
    return LocalModel(summary, folder, config)


def _count(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        return parameters_by_dtype(file)
