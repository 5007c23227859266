"""What is read of a repository of the Hub: a model, or an adapter."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core import errors
from domain.adapter_files import CONFIG, WEIGHTS, choose_adapter
from domain.model_records import weight_files
from domain.repo_tree import RepoFile, Selection, pickled_weights, select
from services.adapter_checks import check_small_files
from services.model_safety import check_snapshot, no_safe_weights


@dataclass(frozen=True)
class Wanted:
    """What is fetched of a repository.

    Attributes:
        config: The file without which it is not one.
        choose: Takes the id and the tree; returns what is read of it, or refuses it.
        weights: Takes names; returns the weights among them, or nothing if they are not complete.
        check: Takes the folder of the small files and the id; refuses it before its weights are fetched.
    """

    config: str
    choose: Callable[[str, Iterable[RepoFile]], Selection]
    weights: Callable[[Iterable[str]], tuple[str, ...]]
    check: Callable[[Path, str], None]


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
    return weight_files(names) or pickled_weights(names)


def _tokenizer_files(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name.startswith("tokenizer"))


def _adapter_weights(names: Iterable[str]) -> tuple[str, ...]:
    return (WEIGHTS,) if WEIGHTS in names else ()


MODEL = Wanted("config.json", partial(_choose_model, pickled=False), weight_files, check_snapshot)
# A model whose pickled weights will do where there are no safetensors.
PICKLED_MODEL = Wanted("config.json", partial(_choose_model, pickled=True), _any_weights, check_snapshot)
# All but a model's weights. Its tokenizer's files stand for them: without any the snapshot is not whole.
TOKENIZER = Wanted("config.json", _choose_tokenizer, _tokenizer_files, check_snapshot)
ADAPTER = Wanted(CONFIG, choose_adapter, _adapter_weights, check_small_files)
