"""Model folders: which folders are model folders, and which of their files may be read."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from core.logging import get_logger
from domain.models.records import ModelFile
from domain.models.safetensors_header import LENGTH_BYTES, SafetensorsHeader, header_length, parse_header

_MAX_JSON_BYTES = 64 * 2**20  # tokenizer_config.json files of 10 MB exist
_CIRCLE = "is a link in a circle"
_MAX_FILES = 10_000  # listed for one model
# Takes a path that is passed over, and why.
OnSkip = Callable[[Path, str], None]
_log = get_logger(__name__)


def _ignore(_path: Path, _reason: str) -> None:
    """Take no notice."""


def model_folder(root: Path, parts: list[str]) -> Path | None:
    """Return the folder that `model_folders` would yield under a name, or None."""
    folder = root
    for number, part in enumerate(parts, 1):
        folder /= part
        if part.startswith(".") or why_not_followed(folder) is not None:
            return None
        if _is_model(folder) != (number == len(parts)):
            return None
    return folder


def why_no_model(root: Path, parts: list[str]) -> str | None:
    """Say why there is something of a model's name below a root, and yet no folder that `model_folder` would return.

    Returns:
        None if there is nothing of that name, or a folder with a config.json.
    """
    folder = root
    for number, part in enumerate(parts, 1):
        folder /= part
        reason = why_not_followed(folder)
        if reason is not None:
            return f"{folder} {reason}"
        if number < len(parts) and _is_model(folder):
            return None
    if not folder.is_dir() or _is_model(folder):
        return None
    reason = why_not_followed(folder / "config.json")
    return f"{folder}/config.json {reason}" if reason is not None else f"{folder} has no config.json"


def why_not_followed(path: Path) -> str | None:
    """Say why a path is not followed: a link that leads nowhere or back, or a folder that cannot be read.

    The links of the operator's model folders are followed wherever they lead, for people keep models on another disk.
    Nobody else can put links there: the service writes nothing there, and what comes over HTTP or from the Hub lies in
    folders of its own, whose links are followed only within them. Whoever unpacks a stranger's archive there trusts its
    links, as with any program. Even those show nothing but names and sizes, config.json and the chat template.
    """
    try:
        if path.is_symlink():
            target = path.resolve(strict=True)
            if path.parent.resolve().is_relative_to(target):
                return f"is a link back to {target}, in which it lies"
        if path.is_dir():
            os.scandir(path).close()
    except FileNotFoundError:
        return f"is a link to {path.readlink()}, where there is nothing"
    except RuntimeError:  # Python before 3.13, of a circle
        return _CIRCLE
    except OSError as error:
        return _CIRCLE if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
    return None


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def text_of(path: Path) -> str | None:
    """Return a small file's text, or None if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def model_folders(
    root: Path, *, levels: int, prefix: str = "", on_skip: OnSkip = _ignore
) -> Iterator[tuple[str, Path]]:
    """Yield `(name, folder)` of the folders with a config.json, behind links as well.

    Args:
        levels: How deep below the root they may be.
        on_skip: Takes what is passed over, hidden folders apart, and why.
    """
    try:
        paths = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _log.warning("local_models.folder_not_read", path=str(root), reason=str(error))
        return
    for path in paths:
        reason = why_not_followed(path)
        if reason is not None:
            on_skip(path, f"it {reason}")
        elif not path.is_dir():
            continue
        elif _is_model(path):
            yield prefix + path.name, path
        elif levels > 1:
            yield from model_folders(path, levels=levels - 1, prefix=f"{path.name}/", on_skip=on_skip)
        else:
            on_skip(path, "it has no config.json")


def inside(path: Path, roots: tuple[Path, ...]) -> Path:
    """Return where a path leads, if that is a file below one of the roots.

    Raises:
        ValueError: The path is a link that leads out of the roots, or to something else than a file.
        OSError: The path leads nowhere.
    """
    resolved = path.resolve(strict=True)
    if not any(resolved.is_relative_to(root) for root in roots):
        raise ValueError(f"{path.name} is a link out of the model's folder")
    if not resolved.is_file():  # to read a pipe or a device might never end
        raise ValueError(f"{path.name} is no plain file")
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
