"""What is read of a repository of the Hub: a model, or an adapter."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core import errors
from domain.adapter_files import CONFIG, WEIGHTS, choose_adapter
from domain.models.repo_tree import RepoFile, Selection, indexed_weights, pickled_weights, select, vocabulary_files
from services.adapters.checks import check_small_files
from services.models.safety import check_snapshot, no_safe_weights


@dataclass(frozen=True)
class Part:
    """What a repository must have to be of use.

    Attributes:
        words: What it is, to be read by people.
        files: Takes names; returns its files among them, or nothing if they are not complete.
    """

    words: str
    files: Callable[[Iterable[str]], tuple[str, ...]]


@dataclass(frozen=True)
class Wanted:
    """What is fetched of a repository.

    Attributes:
        parts: What must be in a folder for it to be whole.
        choose: Takes the id and the tree; returns what is read of it, or refuses it.
        check: Takes the folder of the small files and the id; refuses it before its weights are fetched.
    """

    parts: tuple[Part, ...]
    choose: Callable[[str, Iterable[RepoFile]], Selection]
    check: Callable[[Path, str], None]

    def lacking(self, folder: Path) -> tuple[str, ...]:
        """Say which parts a folder is without: all of them if there is no folder."""
        return self.missing([path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else [])

    def missing(self, names: Sequence[str]) -> tuple[str, ...]:
        """Say which parts the files of a folder lack."""
        return tuple(part.words for part in self.parts if not part.files(names))


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


def _named(name: str) -> Part:
    return Part(name, lambda names: (name,) if name in names else ())


_CONFIG = _named("config.json")
_SAFETENSORS = Part("its safetensors weights (all of them, and the index of shards)", indexed_weights)
_WEIGHTS = Part("its weights (all of them, and the index of shards)", _any_weights)
_VOCABULARY = Part("its tokenizer (tokenizer.json, or another file with the vocabulary)", vocabulary_files)

MODEL = Wanted((_CONFIG, _SAFETENSORS, _VOCABULARY), partial(_choose_model, pickled=False), check_snapshot)
# A model whose pickled weights will do where there are no safetensors.
PICKLED_MODEL = Wanted((_CONFIG, _WEIGHTS, _VOCABULARY), partial(_choose_model, pickled=True), check_snapshot)
# All but a model's weights.
TOKENIZER = Wanted((_CONFIG, _VOCABULARY), _choose_tokenizer, check_snapshot)
ADAPTER = Wanted((_named(CONFIG), _named(WEIGHTS)), choose_adapter, check_small_files)
