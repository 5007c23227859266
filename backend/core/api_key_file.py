"""The file that holds the API key: its owner alone may read it.

`python -m core.api_key_file FILE` makes one, if there is none, and prints its key once.
"""

import os
import secrets
import stat
import sys
from pathlib import Path

_KEY_BYTES = 32
_MAX_BYTES = 10_000  # a key is shorter; a device or another file would not end
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class KeyFileUnusable(Exception):
    """The file cannot be read, or others than its owner can reach it. The message says what to do."""


def read_key_file(path: Path) -> str:
    """Return the key in a file, without the line break at its end.

    Raises:
        KeyFileUnusable: It is no plain file of this user (or root) that nobody else may read or write, or is not text.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise KeyFileUnusable(f"it cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)  # of what is open: a path could lead elsewhere a moment later
        if not stat.S_ISREG(about.st_mode):
            raise KeyFileUnusable("it is no plain file")
        if about.st_uid not in (0, os.geteuid()):
            raise KeyFileUnusable("it belongs to another user")
        if about.st_mode & _OTHERS:
            mode = stat.S_IMODE(about.st_mode)
            raise KeyFileUnusable(f"others may read or change it (mode {mode:04o}); run `chmod 600` on it")
        content = file.read(_MAX_BYTES)
    try:
        return content.decode("ascii").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise KeyFileUnusable("it holds other characters than ASCII's") from error


def make_key_file(path: Path) -> str | None:
    """Write a new key to a file that does not exist yet.

    Returns:
        The key, or None where there is a file already, which stays as it is.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = secrets.token_urlsafe(_KEY_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key + "\n")
        file.flush()
        os.fsync(descriptor)
    return key


def main(arguments: list[str]) -> int:
    """Make the file that is named, and print its key if it is new; returns the exit code."""
    path = Path(arguments[0])
    try:
        key = make_key_file(path)
    except OSError as error:
        print(f"peft-studio: {path}: the API key cannot be written: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 2
    if key is None:
        print(f"The API key is the one in {path}.")  # noqa: T201
    else:
        print(f"The API key, shown this once and kept in {path}:\n\n    {key}\n")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
