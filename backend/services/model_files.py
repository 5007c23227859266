"""From a model id to a folder of safe weights on this machine, downloading it if need be."""

import json
from pathlib import Path
from typing import Protocol

from core.errors import ModelRejected, NeedsRemoteCode, NoSafeWeights
from core.singleton import singleton
from services.embedded_model import MODEL_ID, EmbeddedModel, get_embedded_model
from services.hub_download import LoadProgress, download_snapshot
from services.model_registry_service import get_model_registry_service

_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")


class LocalLookup(Protocol):
    """Finds models on this machine; the registry does."""

    def local_path(self, model_id: str) -> Path | None:
        """Return the model's folder, or None."""
        ...


class ModelFiles:
    """Makes sure that a model's files are here and safe to load.

    Args:
        embedded: The model that needs no Hub.
        local: Finds what is on this machine already.
    """

    def __init__(self, embedded: EmbeddedModel, local: LocalLookup | None = None) -> None:
        self._embedded = embedded
        self._local = local

    def ensure(self, model_id: str, revision: str | None, on_progress: LoadProgress) -> Path:
        """Return the folder.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
            NeedsRemoteCode: A config asks to run the repository's own Python.
            NoSafeWeights: There are no safetensors.
        """
        path = self._locate(model_id, revision, on_progress)
        check_safe(path, model_id)
        return path

    def _locate(self, model_id: str, revision: str | None, on_progress: LoadProgress) -> Path:
        if revision is None:
            if model_id == MODEL_ID:
                return self._embedded.prepare(lambda _stage, fraction: on_progress("loading", fraction, None, None))
            found = self._local.local_path(model_id) if self._local is not None else None
            if found is not None:
                return found
        return download_snapshot(model_id, revision, list(_PATTERNS), on_progress)


def check_safe(path: Path, model_id: str) -> None:
    """Refuse a folder that would run code when it is loaded.

    Raises:
        NeedsRemoteCode, NoSafeWeights, ModelRejected: What is wrong with it.
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_bytes())
        except ValueError as error:
            raise ModelRejected(f"{model_id}: {name} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ModelRejected(f"{model_id}: {name} is not a JSON object")
        if config.get("auto_map"):
            raise NeedsRemoteCode(f"{model_id} asks to run its own Python ({name} has auto_map); it is never run here.")
    if not (path / "config.json").is_file():
        raise ModelRejected(f"{model_id} has no config.json")
    if not any(path.glob("*.safetensors")):
        raise NoSafeWeights(f"{model_id} has no safetensors weights; pickled weights can run code and are not loaded.")


@singleton
def get_model_files() -> ModelFiles:
    """Return the process's model files."""
    return ModelFiles(get_embedded_model(), get_model_registry_service())
