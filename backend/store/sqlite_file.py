"""The SQLite file: checked before the server starts, copied aside once a day."""

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from core.files import fsync_file, fsync_folder, storage_errors

_BACKUP_AGE_S = 86_400.0


class DatabaseDamaged(Exception):
    """The file is not a sound SQLite database; the message names it and the backup."""


def backup_of(path: Path) -> Path:
    """Return where a database's backup is, or will be."""
    return path.with_name(f"{path.name}.backup")


def check(path: Path) -> None:
    """Read a database through and compare its pages with each other.

    Raises:
        DatabaseDamaged: They do not agree, or it is no database.
        OSError: It cannot be read, which proves nothing.
    """
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path)) as connection:
            problems = [row[0] for row in connection.execute("PRAGMA quick_check(5)")]
    except sqlite3.OperationalError as error:  # with no room for the index of its WAL, for one
        raise OSError(
            f"{path} cannot be opened ({error}). Is the disk full, or another program at the file?"
        ) from error
    except sqlite3.DatabaseError as error:
        problems = [str(error)]
    if problems != ["ok"]:
        raise DatabaseDamaged(f"{path} is damaged ({'; '.join(problems)}). {_advice(path)}")


def _advice(path: Path) -> str:
    backup = backup_of(path)
    if not backup.exists():
        return "There is no backup of it; move it away to start with an empty one."
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(backup.stat().st_mtime))
    wal = f"{path.name}-wal and {path.name}-shm"
    return f"The backup of {moment} is {backup}: copy it over {path.name} and delete {wal}, if they are there."


def back_up(path: Path) -> bool:
    """Copy a database aside, unless a copy of the last day is there; tell whether it was copied.

    Raises:
        StorageFull, sqlite3.Error: It cannot be written, for want of space, say; an older copy stays.
    """
    backup = backup_of(path)
    if backup.exists() and time.time() - backup.stat().st_mtime < _BACKUP_AGE_S:
        return False
    temporary = backup.with_name(f"{backup.name}.tmp")
    temporary.unlink(missing_ok=True)
    with storage_errors(backup):
        try:
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(temporary)) as target:
                source.backup(target)
                target.execute("PRAGMA journal_mode=DELETE")  # a file that stands alone, readable on a full disk
            fsync_file(temporary)
            os.replace(temporary, backup)
            fsync_folder(backup.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return True
