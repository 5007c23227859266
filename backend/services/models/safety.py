"""Checks that a model's folder is safe to load: its JSON files ask for no code, and its weights hold none."""

import json
from collections.abc import Iterable
from pathlib import Path

from core.errors import ModelRejected, NoSafeWeights
from domain.models.config_checks import check_asks_for_no_code, check_dimensions
from domain.models.load_files import pickled_weights
from domain.models.records import weight_files
from services.models.folders import read_header

_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json"})  # names of tokens, 10 MB of them, and no setting


def check_snapshot(folder: Path, model_id: str) -> None:
    """Refuse a folder whose JSON files ask for code, or whose config.json is none.

    Raises:
        NeedsRemoteCode, ModelRejected: What is wrong with it.
    """
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".index.json") or file.name in _VOCABULARIES:
            continue
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            if file.name == "config.json":
                raise ModelRejected(f"{model_id}: {file.name} is not JSON: {error}") from error
            continue  # not one that a loader can read either
        if isinstance(content, dict):
            check_asks_for_no_code(model_id, file.name, content)
            if file.name == "config.json":
                check_dimensions(model_id, content)
        elif file.name == "config.json":
            raise ModelRejected(f"{model_id}: config.json is not a JSON object.")
    if not (folder / "config.json").is_file():
        raise ModelRejected(f"{model_id} has no config.json.")


def check_safe(folder: Path, model_id: str) -> None:
    """Refuse a folder that would run code when it is loaded.

    Raises:
        NeedsRemoteCode, NoSafeWeights, ModelRejected: What is wrong with it.
    """
    check_snapshot(folder, model_id)
    names = [path.name for path in folder.iterdir()]
    weights = weight_files(names)
    if not weights:
        raise no_safe_weights(model_id, names)
    for name in weights:
        try:
            read_header(folder / name)
        except (ValueError, OSError) as error:
            raise ModelRejected(f"{model_id}: {name} is broken: {error}.") from error


def no_safe_weights(model_id: str, paths: Iterable[str]) -> NoSafeWeights:
    """Make the error of a model without complete safetensors. It says what there is instead."""
    if pickled_weights(paths):
        return NoSafeWeights(
            f"{model_id} has pickled weights only, which can run code when they are read. With allow_pickle=true they "
            "are read once by torch's restricted unpickler, in a process of its own, and kept as safetensors."
        )
    return NoSafeWeights(f"{model_id} has no safetensors weights, or not all of their shards.")
