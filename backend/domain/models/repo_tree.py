"""The files of a repository as its tree lists them, checked before one of their names touches a disk."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.errors import ModelRejected
from domain.models.records import count, mapping, text, weight_files

_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 255  # what the usual file systems allow
# What transformers reads beside the weights, all of it at the top of the repository.
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TEMPLATES = "additional_chat_templates/"
_INDEX = "model.safetensors.index.json"
# Source: transformers, VOCAB_FILES_NAMES of models/*/tokenization_*.py; and what it converts (tiktoken, tekken).
_VOCABULARY = re.compile(
    r"tokenizer(?!_config\.json).*|.*vocab.*|.*\.(model|tiktoken|spm)|(tekken|encoder)\.json|bpe\.codes|dict\.txt"
)
_PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")


@dataclass(frozen=True)
class RepoFile:
    """A file of a commit.

    Attributes:
        path: Relative, with `/`, without `.` and `..`.
        size_bytes: Of its content.
        git_sha1: Of its content as git hashes a blob; of the pointer where there is a `sha256`.
        sha256: Of its content, where the Hub stores it outside of git.
    """

    path: str
    size_bytes: int
    git_sha1: str
    sha256: str | None

    @property
    def blob(self) -> str:
        """The name of its content in the Hub's cache, which is its digest: the sha256, or else git's sha1."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Selection:
    """What a load reads: first what may refuse it, then what is large."""

    small: tuple[RepoFile, ...]
    weights: tuple[RepoFile, ...]

    @property
    def all(self) -> tuple[RepoFile, ...]:
        """Both."""
        return self.small + self.weights


def content_hash(blob: str, size_bytes: int) -> Any:
    """Return a hashlib object that makes a blob's name from its content.

    Args:
        blob: The name, 64 hexadecimal digits of sha256 or 40 of git's sha1.
        size_bytes: Of the content; git hashes it first. Source: git's "Git Objects", Pro Git section 10.2.
    """
    if _SHA256.fullmatch(blob):
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % size_bytes)
    return digest


def is_blob_name(name: str) -> bool:
    """Tell whether a name is a digest."""
    return bool(_SHA1.fullmatch(name) or _SHA256.fullmatch(name))


def is_commit(revision: str | None) -> bool:
    """Tell whether a revision is a whole commit, which never changes."""
    return revision is not None and bool(_SHA1.fullmatch(revision))


def tree_from_wire(model_id: str, entries: Iterable[Any]) -> tuple[RepoFile, ...]:
    """Read the Hub's tree of a commit.

    Raises:
        ModelRejected: A path leads out of the repository, stands there twice, or an entry is not one.
    """
    files: dict[str, RepoFile] = {}
    for entry in map(mapping, entries):
        path = text(entry.get("path"))
        if path is None or not _is_inside(path):
            raise ModelRejected(f"{model_id} lists {str(path)[:100]!r}, which is no path in a repository.")
        if entry.get("type") != "file":
            continue
        if path in files:
            raise ModelRejected(f"{model_id} lists {path[:100]!r} twice.")
        lfs = mapping(entry.get("lfs"))
        size, sha1, sha256 = count(entry.get("size")), text(entry.get("oid")), text(lfs.get("oid"))
        named = sha1 is not None and _SHA1.fullmatch(sha1) and (sha256 is None or _SHA256.fullmatch(sha256))
        if sha1 is None or size is None or not named or (lfs and sha256 is None):
            raise ModelRejected(f"{model_id} lists {path[:100]!r} without its size or its digest.")
        files[path] = RepoFile(path, size, sha1, sha256)
    return tuple(files.values())


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
        if (path.removeprefix(_TEMPLATES).endswith(".jinja") or path.endswith(_SMALL_SUFFIXES))
        and "/" not in path.removeprefix(_TEMPLATES)
        and (path not in indices or path in wanted_indices)
    ]
    return Selection(tuple(small), tuple(known[path] for path in weights))


def pickled_weights(paths: Iterable[str]) -> tuple[str, ...]:
    """Choose the pickled weights that transformers would read."""
    return tuple(sorted(path for path in paths if _PICKLED.fullmatch(path)))


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


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return (
        len(path.encode(errors="replace")) <= _MAX_PATH_BYTES
        and "\\" not in path
        and path.isprintable()
        and not any(part in ("", ".", "..") or len(part.encode()) > _MAX_PART_BYTES for part in parts)
        and not _DRIVE.match(path)
    )
