"""Migrations make the tables that the code uses; concurrent writers wait for each other."""

import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Column, MetaData, Table, event, inspect, text

from core.errors import DatabaseUnavailable, StorageFull
from domain.exports import GgufSettings
from domain.jobs.states import JobState
from store import database as module
from store.database import Database, newest_migration
from store.repositories import Adapters, Datasets, Exports, Jobs
from store.tables import metadata
from tests.support.commit_cutter import CommitCutter, Cut
from tests.support.job_records import DATASET, MOMENT, job_record
from tests.support.postgres import Postgres, postgres
from tests.support.small_disk import fill


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'studio.db'}")
    else:
        database = Database(request.getfixturevalue("server").url)
        _empty(database)
    yield database
    database.close()


def _empty(database: Database) -> None:
    with database.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))


@pytest.fixture
def database(empty: Database) -> Database:
    empty.migrate()
    return empty


def test_the_migrations_make_the_tables_of_the_code(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_newest_migration_is_the_head_that_alembic_names(database: Database) -> None:
    assert ScriptDirectory(str(Path(module.__file__).parent / "migrations")).get_current_head() == newest_migration()
    database.migrate()
    assert database.version() == newest_migration()


def test_jobs_come_by_priority_then_order_and_change_state_once(database: Database) -> None:
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        for record in (job_record(1, validation_fraction=0.1), job_record(2), job_record(3, priority=5)):
            Jobs(connection).add(record)
    with database.begin() as connection:
        jobs = Jobs(connection)
        order = []
        while (following := jobs.next_queued()) is not None:
            order.append(following.id)
            assert jobs.change_state(following.id, JobState.QUEUED, JobState.PREPARING)
            assert not jobs.change_state(following.id, JobState.QUEUED, JobState.CANCELLED)
        assert order == ["job_3", "job_1", "job_2"]
        first = jobs.get("job_1")
        assert first is not None and first.validation_fraction == 0.1


def test_figures_are_those_of_the_events(database: Database) -> None:
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        jobs = Jobs(connection)
        jobs.add(job_record(1))
        for step in range(1, 4):
            preference = {"margin": step / 8} if step != 2 else None
            data = {"step": step, "loss": 1 / step, "preference": preference, "memory_bytes": 3 * 2**40}
            jobs.append_event("job_1", "metrics", data, MOMENT)
            jobs.append_event("job_1", "evaluation", {"step": step, "eval_loss": 0.5}, MOMENT)
        names = ("step", "loss", "memory_bytes", "preference.margin", "unknown")
        assert jobs.figures("job_1", "metrics", names) == [
            [1, 2, 3],
            [1, 1 / 2, 1 / 3],
            [3 * 2**40] * 3,
            [1 / 8, None, 3 / 8],
            [None] * 3,
        ]
        assert jobs.figures("job_1", "checkpoint", ("step",)) == [[]]


def test_events_of_many_writers_are_numbered_without_gaps(database: Database) -> None:
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        Jobs(connection).add(job_record(1))

    def write() -> None:
        for _ in range(20):
            with database.begin() as connection:
                Jobs(connection).append_event("job_1", "state", {}, "t")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.begin() as connection:
        events = Jobs(connection).events("job_1", 0, 1000)
    assert [event.sequence for event in events] == list(range(1, 81))


def _fill_first_version(database: Database) -> None:
    _upgrade(database, "0001")
    values = asdict(job_record(1)) | {"progress": {}, "result": {}, "config": {"rank": 4}, "validation_fraction": "0.1"}
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        jobs = Table("jobs", MetaData(), autoload_with=connection)
        connection.execute(jobs.insert().values({column.name: values[column.name] for column in jobs.c}))


def test_a_database_of_the_first_version_keeps_its_jobs(empty: Database) -> None:
    _fill_first_version(empty)
    empty.migrate()
    with empty.begin() as connection:
        found = Jobs(connection).get("job_1")
    assert found is not None and (found.stalls, found.resumed_from, found.load_options) == (0, None, None)
    assert found.config == {
        "rank": 4,
        "checkpoint_every_steps": None,
        "checkpoint_every_minutes": 5.0,
        "keep_checkpoints": 2,
    }


def test_a_migration_cut_off_in_its_middle_leaves_the_old_schema(empty: Database) -> None:
    _fill_first_version(empty)
    statements: list[str] = []

    def cut_off(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE alembic_version"):  # the last of a migration
            raise KeyboardInterrupt
        statements.append(statement)

    event.listen(empty.engine, "before_cursor_execute", cut_off)
    with pytest.raises(KeyboardInterrupt):
        empty.migrate()
    event.remove(empty.engine, "before_cursor_execute", cut_off)
    assert any("stalls" in statement for statement in statements)
    assert empty.version() == "0001"
    with empty.begin() as connection:
        assert "stalls" not in {column["name"] for column in inspect(connection).get_columns("jobs")}
    empty.migrate()
    assert empty.version() == newest_migration()


def test_a_restart_of_postgresql_is_waited_out(server: Postgres) -> None:
    database = Database(server.url)
    with database.begin() as connection:
        connection.execute(text("SELECT 1"))
    server.stop()
    restart = threading.Timer(0.5, server.start)
    restart.start()
    with database.begin() as connection:  # over a pooled connection that is dead, to a server that is not up yet
        assert connection.execute(text("SELECT 1")).scalar() == 1
    restart.join()
    with pytest.raises(DatabaseUnavailable), database.begin() as connection:
        server.stop("immediate")
        connection.execute(text("SELECT 1"))
    server.start()
    database.close()


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_commit_that_is_not_answered_is_looked_up(server: Postgres, cut: Cut) -> None:
    direct = Database(server.url)
    _empty(direct)
    direct.migrate()
    with CommitCutter(server.port) as cutter:
        database = Database(server.url.replace(str(server.port), str(cutter.port)))
        cutter.cut_next(cut)
        if cut == "before":
            with pytest.raises(DatabaseUnavailable), database.begin() as connection:
                Datasets(connection).add(DATASET)
        else:
            with database.begin() as connection:
                Datasets(connection).add(DATASET)
        assert cutter.cuts == 1
        with direct.begin() as connection:
            assert len(Datasets(connection).all()) == (cut == "after")
        database.close()
    direct.close()


def test_a_commit_of_a_database_that_stays_away_is_in_doubt_and_said_so(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = Database(server.url)
    _empty(direct)
    direct.migrate()
    monkeypatch.setattr(module, "_CONNECT_WAITS_S", (0.0,))
    with CommitCutter(server.port) as cutter:
        database = Database(server.url.replace(str(server.port), str(cutter.port)))
        cutter.cut_next("after", then_away=True)
        with pytest.raises(DatabaseUnavailable), database.begin() as connection:
            Datasets(connection).add(DATASET)
        with direct.begin() as connection:
            assert len(Datasets(connection).all()) == 1
        database.close()
    direct.close()


def test_a_full_disk_is_named_and_what_was_there_can_be_read(small_disk: Path) -> None:
    database = Database(f"sqlite:///{small_disk / 'studio.db'}")
    database.migrate()
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        Jobs(connection).add(job_record(1))
    fill(small_disk)
    with pytest.raises(StorageFull):
        for _ in range(100):
            with database.begin() as connection:
                Jobs(connection).append_event("job_1", "progress", {"text": "x" * 10_000}, "t")
    with database.begin() as connection:
        assert Jobs(connection).get("job_1") is not None
    database.close()


def test_adapters_of_the_second_version_become_numbered_versions(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'studio.db'}")
    _upgrade(database, "0002")
    old = {
        "base_model_id": "m", "algorithm": "lora", "config": {"rank": 4}, "dataset_sha256": "0" * 64, "metrics": {},
        "path": "p",
    }  # fmt: skip
    with database.begin() as connection:
        columns = [Column(name, JSON if isinstance(value, dict) else None) for name, value in old.items()]
        named: list[Column[Any]] = [Column(name) for name in ("id", "name", "job_id", "created_at")]
        table = Table("adapters", MetaData(), *columns, *named)
        for number, name in ((2, "a"), (1, "a"), (3, "b")):
            row = {"id": f"adp_{number}", "name": name, "job_id": f"job_{number}", "created_at": f"2026-0{number}"}
            connection.execute(table.insert().values(**old | row))
    database.migrate()
    with database.begin() as connection:
        found = {record.id: record for record in Adapters(connection).all()}
    assert {name: record.version for name, record in found.items()} == {"adp_1": 1, "adp_2": 2, "adp_3": 1}
    assert found["adp_2"].source == {"kind": "training", "job_id": "job_2"}
    assert found["adp_1"].config == {"rank": 4}
    database.close()


def test_exports_of_the_third_version_keep_what_they_say(empty: Database) -> None:
    _upgrade(empty, "0003")
    with empty.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO exports (id, sequence, adapter_id, kind, settings, state, attempts, history, created_at) "
                "VALUES ('exp_1', 1, 'adp_1', 'gguf', '{\"quantization\": \"q8_0\"}', 'running', 2, '[]', 't')"
            )
        )
    empty.migrate()
    with empty.begin() as connection:
        (found,) = Exports(connection).all()
    assert (found.id, found.attempts, found.settings) == ("exp_1", 2, GgufSettings(quantization="q8_0"))
    assert found.cancel_request is False


def _upgrade(database: Database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
