"""Model folders: which folders are model folders, and which of their files may be read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from core.logging import get_logger
from domain.models.records import ModelFile
from domain.models.safetensors_header import LENGTH_BYTES, SafetensorsHeader, header_length, parse_header

_MAX_JSON_BYTES = 64 * 2**20  # tokenizer_config.json files of 10 MB exist
_MAX_FILES = 10_000  # listed for one model
_log = get_logger(__name__)


def model_folder(root: Path, parts: list[str]) -> Path | None:
    """Return the folder that `model_folders` would yield under a name, or None."""
    folder = root
    for number, part in enumerate(parts, 1):
        folder /= part
        is_model = (folder / "config.json").is_file()
        if is_model != (number == len(parts)) or folder.is_symlink() or part.startswith("."):
            return None
    return folder


def text_of(path: Path) -> str | None:
    """Return a small file's text, or None if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def model_folders(root: Path, *, levels: int, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yield `(name, folder)` of the folders with a config.json; links to folders are not followed."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _log.warning("local_models.folder_not_read", path=str(root), reason=str(error))
        return
    for folder in folders:
        if folder.name.startswith("."):
            continue
        if (folder / "config.json").is_file():
            yield prefix + folder.name, folder
        elif levels > 1:
            yield from model_folders(folder, levels=levels - 1, prefix=f"{folder.name}/")


def inside(path: Path, roots: tuple[Path, ...]) -> Path:
    """Return where a path leads, if that is below one of the roots.

    Raises:
        ValueError: The path is a link that leads out of the roots.
        OSError: The path leads nowhere.
    """
    resolved = path.resolve(strict=True)
    if not any(resolved.is_relative_to(root) for root in roots):
        raise ValueError(f"{path.name} is a link out of the model's folder")
    return resolved


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file holds no JSON object, or is too large.
        OSError: It cannot be read.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is larger than {_MAX_JSON_BYTES} bytes")
    content = from_json(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def walk(folder: Path, roots: tuple[Path, ...]) -> tuple[ModelFile, ...]:
    """List a folder's files by path, without links that leave the roots."""
    files = []
    for parent, _, names in os.walk(folder):  # does not follow links to folders
        for name in names:
            path = Path(parent) / name
            try:
                size_bytes = inside(path, roots).stat().st_size
            except (ValueError, FileNotFoundError):
                continue  # a link to elsewhere or to nothing: not a file of the model
            files.append(ModelFile(path.relative_to(folder).as_posix(), size_bytes))
        if len(files) >= _MAX_FILES:
            break
    return tuple(sorted(files, key=lambda file: file.path)[:_MAX_FILES])


def read_header(path: Path) -> SafetensorsHeader:
    """Read a safetensors file's header.

    Raises:
        ValueError: It is broken, or the file is not as long as it says.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        length = header_length(file.read(LENGTH_BYTES))
        return parse_header(file.read(length), os.fstat(file.fileno()).st_size - LENGTH_BYTES - length)
