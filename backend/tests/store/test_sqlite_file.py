"""A damaged database is found before it is used, and its backup is named."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import StorageFull
from store.database import Database
from store.sqlite_file import DatabaseDamaged, back_up, backup_of, check
from tests.support.server import BACKEND
from tests.support.small_disk import fill


def make(path: Path) -> Path:
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()
    return path


def test_a_sound_database_passes_and_is_backed_up_once_a_day(tmp_path: Path) -> None:
    path = make(tmp_path / "studio.db")
    check(path)
    check(tmp_path / "none-yet.db")
    assert back_up(path) and not back_up(path)
    check(backup_of(path))
    os.utime(backup_of(path), (0, 0))
    assert back_up(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sound") / "studio.db")


@given(place=st.floats(0, 1), size=st.integers(64, 4096))
def test_overwritten_pages_are_found_wherever_they_hold_anything(sound: Path, place: float, size: int) -> None:
    content = bytearray(sound.read_bytes())
    pages = len(content) // 4096
    page = int(place * (pages - 1))
    start = page * 4096
    content[start : start + size] = b"\xa5" * size  # from a page's head on: what a lost or torn write does
    path = sound.with_name("damaged-studio.db")
    path.write_bytes(content)
    try:
        check(path)
    except DatabaseDamaged as error:
        assert "damaged-studio.db is damaged" in str(error)
    else:  # a page that is not in use: everything can still be read
        assert dump(path) == dump(sound)


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def test_the_server_does_not_start_on_a_damaged_database_and_names_the_backup(tmp_path: Path) -> None:
    path = make(tmp_path / "studio.db")
    back_up(path)
    path.write_bytes(b"not a database" * 1000)
    environment = os.environ | {"PEFT_STUDIO_HOME": str(tmp_path), "PEFT_STUDIO_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=BACKEND, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert str(path) in done.stderr and str(backup_of(path)) in done.stderr
    path.write_bytes(backup_of(path).read_bytes())
    check(path)


def test_a_backup_that_has_no_room_leaves_the_older_one(small_disk: Path) -> None:
    path = make(small_disk / "studio.db")
    back_up(path)
    os.utime(backup_of(path), (0, 0))
    fill(small_disk)
    with pytest.raises(OSError, match="Is the disk full"):
        check(path)
    with pytest.raises((StorageFull, sqlite3.OperationalError)):
        back_up(path)
    check(backup_of(path))
    assert not list(small_disk.glob("*.tmp"))
