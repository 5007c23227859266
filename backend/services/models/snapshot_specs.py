"""The snapshot specs of models: which files of a model's repository are downloaded."""

from collections.abc import Iterable
from functools import partial

from core import errors
from domain.hub.tree import RepoFile, Selection
from domain.models.load_files import indexed_weights, pickled_weights, select, vocabulary_files
from services.hub.snapshot_spec import Part, SnapshotSpec
from services.models.safety import check_snapshot, no_safe_weights


def _choose_model(model_id: str, files: Iterable[RepoFile], *, pickled: bool) -> Selection:
    files = tuple(files)
    chosen = select(files, pickled=pickled)
    if all(file.path != "config.json" for file in chosen.small):
        raise errors.ModelRejected(f"{model_id} has no config.json: it is not a transformers model.")
    if not chosen.weights:
        raise no_safe_weights(model_id, [file.path for file in files])
    return chosen


def _choose_tokenizer(model_id: str, files: Iterable[RepoFile]) -> Selection:
    small = select(files).small
    if all(file.path != "config.json" for file in small):
        raise errors.ModelRejected(f"{model_id} has no config.json: it is not a transformers model.")
    return Selection(small, ())


def _any_weights(names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    return indexed_weights(names) or pickled_weights(names)


_CONFIG = Part.named("config.json")
_SAFETENSORS = Part("its safetensors weights (all of them, and the index of shards)", indexed_weights)
_WEIGHTS = Part("its weights (all of them, and the index of shards)", _any_weights)
_VOCABULARY = Part("its tokenizer (tokenizer.json, or another file with the vocabulary)", vocabulary_files)

MODEL = SnapshotSpec((_CONFIG, _SAFETENSORS, _VOCABULARY), partial(_choose_model, pickled=False), check_snapshot)
# A model that may be loaded from pickled weights where it has no safetensors.
PICKLED_MODEL = SnapshotSpec((_CONFIG, _WEIGHTS, _VOCABULARY), partial(_choose_model, pickled=True), check_snapshot)
# All but a model's weights.
TOKENIZER = SnapshotSpec((_CONFIG, _VOCABULARY), _choose_tokenizer, check_snapshot)
