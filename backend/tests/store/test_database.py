"""Migrations make the tables that the code uses; concurrent writers wait for each other."""

import threading
from dataclasses import asdict
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Column, MetaData, Table

from domain.job_states import JobState
from store import database as module
from store.database import HEAD, Database
from store.records import DatasetRecord, JobRecord
from store.repositories import Datasets, Jobs
from store.tables import metadata


def _open(path: Path) -> Database:
    database = Database(f"sqlite:///{path / 'studio.db'}")
    database.migrate()
    return database


def _job(number: int, priority: int = 0) -> JobRecord:
    return JobRecord(
        id=f"job_{number}", sequence=number, name="n", state=JobState.QUEUED, priority=priority, idempotency_key=None,
        request_sha256="", model_id="m", revision=None, loaded_model_id=None, algorithm="lora", config={},
        dataset_id="ds", validation_dataset_id=None, validation_fraction=0.1, progress={}, result={}, attempts=0,
        stalls=0, resumed_from=None, adapter_id=None, error=None, created_at="2026-01-01T00:00:00.000000Z",
        started_at=None, finished_at=None,
    )  # fmt: skip


DATASET = DatasetRecord("ds", "n", "messages", 1, 0, 1, "0" * 64, [], [], "2026-01-01T00:00:00.000000Z")


def test_the_migrations_make_the_tables_of_the_code(tmp_path: Path) -> None:
    database = _open(tmp_path)
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    database.close()


def test_the_head_named_in_the_code_is_the_newest_migration(tmp_path: Path) -> None:
    assert ScriptDirectory(str(Path(module.__file__).parent / "migrations")).get_current_head() == HEAD
    database = _open(tmp_path)
    database.migrate()
    assert database.version() == HEAD
    database.close()


def test_jobs_come_by_priority_then_order_and_change_state_once(tmp_path: Path) -> None:
    database = _open(tmp_path)
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        for record in (_job(1), _job(2), _job(3, priority=5)):
            Jobs(connection).add(record)
    with database.begin() as connection:
        jobs = Jobs(connection)
        order = []
        while (record := jobs.next_queued()) is not None:
            order.append(record.id)
            assert jobs.change_state(record.id, JobState.QUEUED, JobState.PREPARING)
            assert not jobs.change_state(record.id, JobState.QUEUED, JobState.CANCELLED)
        assert order == ["job_3", "job_1", "job_2"]
        assert jobs.get("job_1").validation_fraction == 0.1  # type: ignore[union-attr]
    database.close()


def test_events_of_many_writers_are_numbered_without_gaps(tmp_path: Path) -> None:
    database = _open(tmp_path)
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        Jobs(connection).add(_job(1))

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
    database.close()


def test_a_database_of_the_first_version_keeps_its_jobs(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'studio.db'}")
    _upgrade(database, "0001")
    old = {name: value for name, value in asdict(_job(1)).items() if name not in ("stalls", "resumed_from")}
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        columns = [Column(name, JSON if isinstance(value, dict) else None) for name, value in old.items()]
        jobs = Table("jobs", MetaData(), *columns)
        connection.execute(jobs.insert().values(**old | {"config": {"rank": 4}, "validation_fraction": "0.1"}))
    database.migrate()
    with database.begin() as connection:
        found = Jobs(connection).get("job_1")
    assert found is not None and (found.stalls, found.resumed_from) == (0, None)
    assert found.config == {
        "rank": 4,
        "checkpoint_every_steps": None,
        "checkpoint_every_minutes": 5.0,
        "keep_checkpoints": 2,
    }
    database.close()


def _upgrade(database: Database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
