"""Ended runs with thousands of points, written straight into a database."""

from pathlib import Path

from sqlalchemy import insert

from core.errors import EngineFailed
from domain.jobs.failures import failure
from domain.jobs.states import JobState
from store.database import Database
from store.repositories import Datasets, Jobs
from store.tables import job_events
from tests.support.job_records import DATASET, MOMENT, job_record

ERROR = failure("out_of_host_memory", EngineFailed("No memory for <b>this</b>."))


def add_long_runs(home: Path, runs: int, points: int) -> None:
    """Make the database of a data directory, with runs `job_1`… that differ in their rank and have failed."""
    database = Database(f"sqlite:///{home / 'studio.db'}")
    database.migrate()
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        for number in range(1, runs + 1):
            config = job_record(number).config | {"rank": number}
            Jobs(connection).add(job_record(number, name=f"rank {number}", config=config))
            Jobs(connection).change_state(
                f"job_{number}", JobState.QUEUED, JobState.FAILED, error=ERROR, finished_at=MOMENT
            )
            rows = [
                {
                    "job_id": f"job_{number}",
                    "sequence": step,
                    "kind": "metrics",
                    "data": {"step": step, "loss": 3 / (1 + step / (40 * number))},
                    "created_at": MOMENT,
                }
                for step in range(1, points + 1)
            ]
            connection.execute(insert(job_events), rows)
    database.close()
