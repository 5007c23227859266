"""Checks before the server starts: the address and the folders that the settings name."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from core.home_lock import lock_home
from core.settings import Settings, SettingsRejected


def check_host(settings: Settings) -> None:
    """Look up the address that the server listens on.

    Raises:
        SettingsRejected: No such host is known.
    """
    try:
        socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else error
        raise SettingsRejected((f"PEFT_STUDIO_HOST={settings.host}: {reason}",)) from error


def open_home(settings: Settings) -> IO[str]:
    """Create the data directory if it does not exist, and lock it for this process.

    Returns:
        The open lock file. Keep it open: closing it releases the lock.

    Raises:
        HomeTaken: Another server has it.
        SettingsRejected: It cannot be created or written.
    """
    try:
        lock = lock_home(settings.home)
        if not os.access(settings.home, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(settings.home))
    except OSError as error:
        raise SettingsRejected(
            (f"PEFT_STUDIO_HOME={settings.home}: the data directory cannot be used: {_words(error)}",)
        ) from error
    return lock


def make_cache_dir(settings: Settings) -> None:
    """Create the cache folder if it does not exist.

    Raises:
        SettingsRejected: It cannot be made.
    """
    folder = settings.resolved_cache_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsRejected((f"PEFT_STUDIO_CACHE_DIR={folder}: it cannot be made: {_words(error)}",)) from error


def unreadable_model_dirs(settings: Settings) -> Iterator[tuple[Path, str]]:
    """Yield the model folders that cannot be read now, each with the reason.

    They do not keep the server from starting: a disk may be mounted later.
    """
    for folder in settings.model_dirs:
        reason = why_unreadable(folder)
        if reason is not None:
            yield folder, f"it {reason}"


def why_unreadable(folder: Path) -> str | None:
    """Say why a folder cannot be read, or return None."""
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _words(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}"
