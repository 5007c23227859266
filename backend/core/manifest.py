"""A manifest shows that a folder is whole. It holds the sha256 sum of every file, and a sum of its own content.

Files in sub-folders are listed by their relative paths with `/`.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "manifest.json"


class FolderDamaged(Exception):
    """A file is missing, cut, changed or not listed; the message names it."""


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Write a folder's manifest: the sums of all files in it and below it, and what the folder is about."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in _entries(folder).items()
        if not path.is_dir()
    }
    body = {"about": about, "files": files}
    (folder / NAME).write_text(json.dumps(body | {"sum": _sum(body)}, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a folder is about, without reading its files.

    Raises:
        FolderDamaged: The manifest is missing or not as it was written, or a file has another size.
    """
    about, _ = _read(folder)
    return about


def verify(folder: Path) -> dict[str, Any]:
    """Check every file's sum, then return what the folder is about.

    Raises:
        FolderDamaged: The manifest is damaged, or a file does not match its sum.
    """
    about, files = _read(folder)
    for name, facts in files.items():
        try:
            actual_sum = sha256_of(folder / name)
        except OSError as error:
            raise FolderDamaged(f"{name} cannot be read: {error}") from error
        if actual_sum != facts["sha256"]:
            raise FolderDamaged(f"{name} is not as it was written: its sha256 sum differs")
    return about


def sha256_of(path: Path) -> str:
    """Return a file's sha256 sum in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        document = json.loads((folder / NAME).read_bytes())
        claimed = document.pop("sum")
        about, files = document["about"], document["files"]
    except FileNotFoundError as error:
        raise FolderDamaged(f"{NAME} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderDamaged(f"{NAME} cannot be read") from error
    if claimed != _sum(document):
        raise FolderDamaged(f"{NAME} is not as it was written: its sum differs")
    _compare(_entries(folder), files)
    return about, files


def _compare(present: dict[str, Path], files: dict[str, dict[str, Any]]) -> None:
    """Compare what is there with what a manifest lists.

    Raises:
        FolderDamaged: A file is missing, of another kind or size, or was added.
    """
    for name, facts in files.items():
        path = present.pop(name, None)
        if path is None:
            raise FolderDamaged(f"{name} is missing")
        if path.is_symlink() or not path.is_file():
            raise FolderDamaged(f"{name} is not a plain file")
        if path.stat().st_size != facts["bytes"]:
            raise FolderDamaged(f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}")
    for name in files:
        for parent in PurePosixPath(name).parents:
            present.pop(str(parent), None)
    if present:
        raise FolderDamaged(f"{min(present)} does not belong there")


def _entries(folder: Path) -> dict[str, Path]:
    """Return every file and folder below a folder, by its relative path with `/`. The manifest is left out."""
    entries = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    entries.pop(NAME, None)
    return entries


def _sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
