"""What a refused request must leave as it was: the files, the database's rows, the open files, and no engine."""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.support.server import StudioServer, wait_until

_WRITTEN_ALL_THE_TIME = ("server.log", "studio.db")  # and the database's own files beside it
_STARTS = re.compile(r"^\w*engine_starts_total (\S+)$", re.MULTILINE)


def engine_starts(studio: StudioServer) -> float:
    """Return how many engines the server has started since it began, ended ones and those of shapes included."""
    answers: list[str] = []

    def asked() -> bool:
        answers.append(studio.http.get("/metrics").text)
        return _STARTS.search(answers[-1]) is not None

    wait_until(asked)  # a server whose client has too many requests under way puts it off
    return float(_STARTS.findall(answers[-1])[0])


@contextmanager
def untouched(studio: StudioServer, *folders: Path) -> Iterator[None]:
    """Assert that the block writes nothing, leaves no temporary file and starts no engine.

    Args:
        studio: Whose data directory and database are looked at. Its engines are counted by its own counter, so one that
            was started and has ended counts too.
        folders: Looked at as well.
    """
    before = _state(studio, folders)
    starts = engine_starts(studio)
    yield
    wait_until(
        lambda: not _changed(before, _state(studio, folders)), 20, lambda: _changed(before, _state(studio, folders))
    )
    assert engine_starts(studio) == starts


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what differs, by its name: as it was, and as it is."""
    return {
        name: (before.get(name), after.get(name))
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    }


def _state(studio: StudioServer, folders: tuple[Path, ...]) -> dict[str, Any]:
    return {
        **{str(path): path.stat().st_size for root in (studio.home, *folders) for path in _files(root)},
        **{f"rows of {table}": count for table, count in _rows(studio.home / "studio.db").items()},
        "temporary files": _open_and_deleted(studio.pid),
    }


def _files(root: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(root):
        for name in names:
            path = Path(parent) / name
            if not name.startswith(_WRITTEN_ALL_THE_TIME) and path.exists():
                yield path


def _rows(database: Path) -> dict[str, int]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}


def _open_and_deleted(pid: int) -> int:
    """Count the files that a process holds open and that have no name: what Python's temporary files are."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(link).endswith("(deleted)")
        except FileNotFoundError:  # closed meanwhile
            continue
    return count
