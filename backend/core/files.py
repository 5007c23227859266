"""Files that are whole or absent: written aside, flushed to the disk, renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import StorageFull


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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the kernel's "no space left" into the error the API speaks of."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"No space is left on the device that holds {path.parent}.") from error
        raise
