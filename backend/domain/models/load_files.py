"""The files of a repository that a load reads, chosen by their names."""

import re
from collections.abc import Iterable

from domain.hub.tree import RepoFile, Selection
from domain.models.records import weight_files

# What transformers reads beside the weights, all of it at the top of the repository.
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
TEMPLATES_FOLDER = "additional_chat_templates/"  # of a tokenizer with several named chat templates
_INDEX = "model.safetensors.index.json"
# Source: transformers, VOCAB_FILES_NAMES of models/*/tokenization_*.py; and what it converts (tiktoken, tekken).
_VOCABULARY = re.compile(
    r"tokenizer(?!_config\.json).*|.*vocab.*|.*\.(model|tiktoken|spm)|(tekken|encoder)\.json|bpe\.codes|dict\.txt"
)
_PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")


def select(files: Iterable[RepoFile], *, pickled: bool = False) -> Selection:
    """Choose what a load reads.

    Args:
        files: The whole tree.
        pickled: Whether `pytorch_model.bin` will do where there are no safetensors.
    """
    known = {file.path: file for file in files}
    weights = weight_files(known) or (pickled_weights(known) if pickled else ())
    indices = {f"{stem}.index.json" for stem in ("model.safetensors", "pytorch_model.bin")}
    wanted_indices = {f"{_stem(path)}.index.json" for path in weights}
    small = [
        file
        for path, file in sorted(known.items())
        if (is_named_template(path) or ("/" not in path and path.endswith(_SMALL_SUFFIXES)))
        and (path not in indices or path in wanted_indices)
    ]
    return Selection(tuple(small), tuple(known[path] for path in weights))


def pickled_weights(paths: Iterable[str]) -> tuple[str, ...]:
    """Choose the pickled weights that transformers would read."""
    return tuple(sorted(path for path in paths if _PICKLED.fullmatch(path)))


def is_named_template(path: str) -> bool:
    """Tell whether a path is that of one of several chat templates of a tokenizer."""
    name = path.removeprefix(TEMPLATES_FOLDER)
    return name != path and "/" not in name and name.endswith(".jinja")


def vocabulary_files(paths: Iterable[str]) -> tuple[str, ...]:
    """Choose what a tokenizer reads its vocabulary from; without any there is no tokenizer."""
    return tuple(sorted(path for path in paths if _VOCABULARY.fullmatch(path) and "/" not in path))


def indexed_weights(paths: Iterable[str]) -> tuple[str, ...]:
    """Choose the safetensors that transformers would read from a folder: shards need their index."""
    names = tuple(paths)
    weights = weight_files(names)
    return weights if all(_stem(name) == name for name in weights) or _INDEX in names else ()


def _stem(path: str) -> str:
    """Return `model.safetensors` of `model-00001-of-00002.safetensors`."""
    return re.sub(r"-\d{5}-of-\d{5}", "", path)
