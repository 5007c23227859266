"""What the JSON columns hold is read into types, as any version wrote it, and written back as it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from core.errors import StudioError
from domain.exports import ExportChange, GgufFile, GgufSettings, MergedModel, MergedSettings, PushSettings
from domain.jobs.export_states import ExportKind, ExportState
from domain.jobs.failures import Failure, failure
from domain.jobs.figures import JobResult
from domain.jobs.load_options import LoadOptions
from domain.jobs.progress import EngineUsed, StepFigures
from domain.jobs.states import JobState
from store import tables
from store.database import Database
from store.repositories import Exports, Jobs

# As the first version wrote them, before checkpoints, pauses and the figures that came with them.
FIRST_STEP = {
    "step": 3, "total_steps": 4, "epoch": 0.75, "loss": 1.5, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 30,
    "tokens_per_s": 10.0, "memory_bytes": 7, "elapsed_s": 3.0, "eta_s": 1.0,
}  # fmt: skip
FIRST_PROGRESS = {
    "step": 3, "total_steps": 4, "epoch": 0.75, "fraction": 0.75, "eta_s": 1.0, "tokens_per_s": 10.0,
    "last": FIRST_STEP,
}  # fmt: skip
FIRST_RESULT = {
    "steps": 4, "first_loss": 2.0, "final_loss": 1.0, "initial_eval_loss": None, "final_eval_loss": None, "tokens": 40,
    "elapsed_s": 4.0, "stopped_early": False, "trainable_parameters": 8, "rows": 5, "validation_rows": 0,
    "memory_bytes": 7, "log_tail": ["loaded"],
}  # fmt: skip
JOB = {
    "id": "job_1", "sequence": 1, "name": "n", "state": "succeeded", "priority": 0, "request_sha256": "",
    "model_id": "m", "algorithm": "lora", "config": {}, "dataset_id": "ds", "validation_fraction": "0.0", "attempts": 1,
    "created_at": "t",
}  # fmt: skip
DATASET = {
    "id": "ds", "name": "n", "format": "messages", "rows": 5, "rejected_rows": 0, "bytes": 1, "sha256": "0" * 64,
    "columns": [], "warnings": [], "created_at": "t",
}  # fmt: skip
EXPORT = {
    "sequence": 1, "adapter_id": "adp_1", "state": "succeeded", "attempts": 1, "created_at": "t",
    "history": [{"state": "queued", "at": "t"}, {"state": "running", "at": "u"}],
}  # fmt: skip
MERGED = {"size_bytes": 1, "dtype": "float32", "adapted_layers": 14, "notes": ["so"]}
GGUF = {
    "filename": "m.gguf", "size_bytes": 1, "tensors": {"F32": 5}, "pre_tokenizer": "smollm", "adapted_layers": 14,
    "notes": [],
}  # fmt: skip


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'studio.db'}")
    database.migrate()
    with database.begin() as connection:
        connection.execute(insert(tables.datasets).values(**DATASET))
    yield database
    database.close()


def _add_job(database: Database, **columns: Any) -> None:
    with database.begin() as connection:
        connection.execute(insert(tables.jobs).values(**JOB | columns))


def _raw(database: Database, column: str) -> Any:
    with database.begin() as connection:
        return connection.execute(select(tables.jobs.c[column])).scalar_one()


def test_a_job_of_the_first_version_is_read_and_says_what_it_said(database: Database) -> None:
    error = {
        "class": "engine",
        "message": "it ended",
        "exit_code": 1,
        "signal": None,
        "log_tail": ["x"],
        "suggestions": [],
    }
    _add_job(database, progress=FIRST_PROGRESS, result=FIRST_RESULT, error=error)
    with database.begin() as connection:
        (job,) = Jobs(connection).all()
    assert job.load_options is None and job.progress.recorded_step == 0 and not job.progress.forced
    assert isinstance(job.progress.last, StepFigures) and job.progress.last.as_json() == FIRST_STEP
    assert isinstance(job.result, JobResult) and job.result.best_eval_loss is None and job.result.adapter_step is None
    assert (job.progress.as_json(), job.result.as_json()) == (FIRST_PROGRESS, FIRST_RESULT)
    assert isinstance(job.error, Failure) and job.error.error_class == "engine" and job.error.as_json() == error


def test_a_job_that_has_only_been_queued_is_read_and_moves_on(database: Database) -> None:
    _add_job(database, progress={}, result={}, state="queued")
    with database.begin() as connection:
        jobs = Jobs(connection)
        (job,) = jobs.all()
        assert (job.progress.as_json(), job.result, job.error) == ({}, None, None)
        progress = job.progress.on_engine(EngineUsed(name="transformers", reason="no GPU", computation=None))
        jobs.set("job_1", progress=progress.started(0, 4))
        details = failure("disk_full", StudioError("full"))
        assert jobs.change_state("job_1", JobState.QUEUED, JobState.PAUSED, error=details)
        jobs.append_event("job_1", "state", {"state": "paused", "error": details}, "t")
        (event,) = jobs.events("job_1", 0, 10)
    assert _raw(database, "progress") == {
        "engine": {"name": "transformers", "reason": "no GPU", "computation": None}, "step": 0, "total_steps": 4,
    }  # fmt: skip
    assert _raw(database, "error") == event.data["error"] == details.as_json()
    assert details.as_json()["class"] == "disk_full" and len(details.as_json()) == 6


def test_what_a_newer_version_wrote_besides_is_left_out(database: Database) -> None:
    _add_job(database, progress=FIRST_PROGRESS | {"unheard_of": 1}, result={}, load_options={
        "engine": "unsloth", "device": 1, "force": False, "allow_pickle": True, "unheard_of": 1,
    })  # fmt: skip
    with database.begin() as connection:
        (job,) = Jobs(connection).all()
    assert job.progress.as_json() == FIRST_PROGRESS
    assert job.load_options == LoadOptions(engine="unsloth", device=1, force=False, allow_pickle=True)


@pytest.mark.parametrize(
    ("kind", "settings", "result", "settings_type", "result_type"),
    [
        ("merged", {}, MERGED, MergedSettings, MergedModel),
        ("gguf", {"quantization": "q8_0"}, GGUF, GgufSettings, GgufFile),
        ("push", {"repo_id": "me/a", "private": True, "token": "server"}, None, PushSettings, type(None)),
    ],
)  # fmt: skip
def test_an_export_is_read_by_its_kind(
    database: Database, kind: str, settings: Any, result: Any, settings_type: type, result_type: type
) -> None:
    with database.begin() as connection:
        row = EXPORT | {"id": "exp_1", "kind": kind, "settings": settings, "result": result, "cancel_request": False}
        connection.execute(insert(tables.exports).values(**row))
        (found,) = Exports(connection).all()
        assert found.kind is ExportKind(kind) and type(found.settings) is settings_type
        assert found.settings.as_json() == settings and type(found.result) is result_type
        assert found.result is None or found.result.as_json() == result
        assert found.history[0] == ExportChange(state=ExportState.QUEUED, at="t")
        Exports(connection).delete("exp_1")
        Exports(connection).add(found)
        written = connection.execute(select(tables.exports)).one()._mapping
    assert {name: written[tables.exports.c[name]] for name in row} == row
