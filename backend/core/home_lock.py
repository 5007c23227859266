"""One server a data directory."""

import fcntl
import os
from pathlib import Path
from typing import IO


class HomeTaken(Exception):
    """Another server uses the data directory."""


def lock_home(home: Path) -> IO[str]:
    """Lock the data directory for this process. The kernel releases the lock when the process ends.

    Returns:
        The open lock file. Keep it open: closing it releases the lock.

    Raises:
        HomeTaken: Another server has it; the message names its pid.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (home / "server.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise HomeTaken(f"{home} is in use by the server with pid {holder}") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
