"""Files that are whole or absent: written aside, flushed to the disk, renamed."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import StorageFull

_REPLACED = ".old.tmp"


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    _fsync(folder, getattr(os, "O_DIRECTORY", 0))


def fsync_file(file: Path) -> None:
    """Flush the content of a file that a library wrote."""
    _fsync(file, 0)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        StorageFull: The device has no space left; the old content is kept.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # several may write at once
    with storage_errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, then flush it and rename it to `target`: it is whole there, or not there.

    A folder already at `target` is replaced. It stays as it is until the new one is on the disk. Then it is moved
    aside and deleted last, because an interrupted deletion would leave a part of it.

    Raises:
        StorageFull: The device has no space left.
    """
    temporary = target.with_name(f".{target.name}.tmp")  # hidden until it is whole
    replaced = target.with_name(f".{target.name}{_REPLACED}")
    with storage_errors(target):
        if target.parent.is_dir():
            finish_replacing(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                (fsync_folder if path.is_dir() else fsync_file)(path)
            fsync_folder(temporary)
            if target.exists():
                os.replace(target, replaced)
            os.replace(temporary, target)
            fsync_folder(target.parent)
        except BaseException:
            if replaced.exists() and not target.exists():
                os.replace(replaced, target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


def plain_files(folder: Path) -> list[tuple[str, Path]]:
    """Return every plain file below a folder as (path relative to it with `/`, path), by name; no links."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted((path.relative_to(folder).as_posix(), path) for path in files)


def finish_replacing(parent: Path) -> None:
    """Put back, or delete, the old folders that an interrupted `whole_folder` left aside."""
    for replaced in parent.glob(f".*{_REPLACED}"):
        target = parent / replaced.name.removesuffix(_REPLACED).removeprefix(".")
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, target)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the kernel's "no space left" into StorageFull."""
    try:
        yield
    except Exception as error:
        if says_no_space(error):
            raise StorageFull(f"No space is left on the device that holds {path.parent}.") from error
        raise


def says_no_space(error: BaseException) -> bool:
    """Tell whether an error is the kernel's "no space left", passed on by Python or by a library in another language.

    safetensors, written in Rust, raises its own class with the kernel's number in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {code})" in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
