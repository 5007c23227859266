"""The queue, with doubles in the place of models: who runs where, and what races leave behind."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.clock import SystemClock
from core.errors import (
    DatabaseUnavailable,
    HubUnavailable,
    ModelRejected,
    SettingRejected,
    StudioError,
    TransitionNotPermitted,
)
from domain.configure import configure
from domain.jobs.load_options import LoadOptions
from domain.jobs.progress import JobProgress
from domain.jobs.states import FINAL_STATES, JobState
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from services.engines.process import CommandFailed
from services.peft_service import ConfiguredLoad, LoadedModel, LoadRequest, PeftService
from services.training.checkpoint_store import CheckpointStore
from services.training.dataset_analysis import DatasetAnalysisService, Running
from services.training.ledger import JobLedger
from services.training.queue import TrainingQueue
from services.training.request_contexts import RequestContexts
from services.training.work import TrainingWork
from services.training_service import TrainingService
from store.database import Database
from store.records import JobRecord
from store.repositories import Datasets, Jobs
from tests.support.commit_cutter import CommitCutter
from tests.support.job_records import CONFIG, CPU, DATASET, job_record
from tests.support.postgres import postgres
from tests.support.server import wait_until


class Models(PeftService):
    """No model is loaded; what a load comes to is the test's."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._result_of = load

    def models(self) -> list[LoadedModel]:
        return []

    def load(self, request: LoadRequest | ConfiguredLoad) -> LoadedModel:
        model: LoadedModel = self._result_of(request)
        return model

    def savings(
        self, model_id: str, revision: str | None, config: PeftConfig, *, on_gpu: bool, on_unsloth: bool
    ) -> list[str]:
        return ["batch_size=1 (needs less)"]


class NoAnalyses(DatasetAnalysisService):
    """No dataset has to be looked at first."""

    def __init__(self) -> None:
        pass

    def begin_in_doubt(self, job: JobRecord) -> Running | None:
        return None


class Studio:
    """A training service whose models come to nothing, in the way that the test says."""

    def __init__(
        self, folder: Path, load: Callable[[Any], Any], devices: tuple[str, ...] = ("cpu",), url: str | None = None
    ) -> None:
        self.database = Database(url or f"sqlite:///{folder / 'studio.db'}")
        self.database.migrate()
        with self.database.begin() as connection:
            Datasets(connection).add(DATASET)
        none: Any = None  # what no job of these tests comes to
        peft, analyses = Models(load), NoAnalyses()
        self.checkpoints, contexts, clock = CheckpointStore(folder / "checkpoints"), RequestContexts(), SystemClock()
        self.ledger = JobLedger(self.database, clock, contexts.drop)
        work = TrainingWork(peft, none, none, analyses, self.checkpoints, None, lambda: 0)
        self.queue = TrainingQueue(self.ledger, work, self.checkpoints, contexts, clock, lambda: devices)
        self.service = TrainingService(self.ledger, self.queue, none, self.checkpoints, contexts, clock)

    def add(self, number: int, **changes: Any) -> str:
        record = job_record(number, **changes)
        with self.database.begin() as connection:
            Jobs(connection).add(record)
        return record.id

    def states(self) -> list[JobState]:
        return [job.state for job in reversed(self.ledger.all())]

    def close(self) -> None:
        self.service.close()
        self.database.close()


def refuse(error: StudioError) -> Callable[[Any], Any]:
    def load(_request: Any) -> Any:
        raise error

    return load


def test_each_device_has_a_job_of_its_own_and_no_job_runs_twice(tmp_path: Path) -> None:
    together = threading.Barrier(2)
    seen: list[str] = []

    def load(request: Any) -> Any:
        seen.append(request.device)
        together.wait(timeout=600)  # passes only if two jobs are on their way at once
        raise ModelRejected("enough seen")

    studio = Studio(tmp_path, load, devices=("0", "1"))
    for number in range(1, 7):
        studio.add(number)
    studio.service.start()
    wait_until(lambda: set(studio.states()) == {JobState.FAILED})
    studio.close()
    assert len(seen) == 6 and sorted(seen) == ["0"] * 3 + ["1"] * 3
    assert all(job.attempts == 1 for job in studio.ledger.all())


def test_a_job_for_two_gpus_waits_for_both_and_is_not_overtaken(tmp_path: Path) -> None:
    """On two GPUs, jobs for one, two and one. The first two last until the workers have looked for more to do."""
    seen: list[tuple[str, list[str]]] = []
    looks: list[str] = []

    def load(request: Any) -> Any:
        before = len(looks)
        if request.model_id != "last":
            wait_until(lambda: len(looks) >= before + 3)  # the idle worker looks at least once a second
        seen.append((request.model_id, [job.model_id for job in studio.ledger.all() if job.state in FINAL_STATES]))
        raise ModelRejected("enough seen")

    studio = Studio(tmp_path, load, devices=("0", "1"))
    next_queued = studio.ledger.next_queued

    def looked() -> JobRecord | None:
        looks.append("")
        return next_queued()

    studio.ledger.next_queued = looked  # type: ignore[method-assign]
    for number, (name, gpus) in enumerate([("first", 1), ("both", 2), ("last", 1)], start=1):
        studio.add(number, model_id=name, gpus=gpus)
    studio.service.start()
    wait_until(lambda: set(studio.states()) == {JobState.FAILED})
    studio.close()
    assert seen == [("first", []), ("both", ["first"]), ("last", ["both", "first"])]


def test_a_job_for_more_gpus_than_are_left_says_so(tmp_path: Path) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("not reached")), devices=("0", "1"))
    studio.add(1, gpus=3)
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.FAILED])
    studio.close()
    (job,) = studio.ledger.all()
    assert job.error is not None and "takes 3 GPUs, and this machine has 2" in job.error.message


def test_a_hub_that_is_away_is_tried_again_as_told_and_not_for_ever(tmp_path: Path) -> None:
    asked: list[float] = []
    studio = Studio(tmp_path, refuse(HubUnavailable("away", retry_after_s=0.01)))
    retry_after = studio.queue.retry_after

    def at_once(job_id: str, seconds: float) -> None:
        asked.append(seconds)
        retry_after(job_id, 0.0)

    studio.queue.retry_after = at_once  # type: ignore[method-assign]
    studio.add(1)
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.FAILED])
    studio.close()
    (job,) = studio.ledger.all()
    assert job.error is not None and job.error.error_class == "hub_unavailable" and "5th time" in job.error.message
    assert asked == [0.01, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("first", "then", "after"),
    [
        ("pause", None, JobState.PAUSED),
        ("nothing", None, JobState.CANCELLED),
        ("pause", "checkpoints", JobState.CANCELLED),
        ("checkpoints", "nothing", JobState.CANCELLED),
    ],
)
def test_a_wish_made_while_the_hub_does_not_answer_is_obeyed_when_it_fails(
    tmp_path: Path, first: str, then: str | None, after: JobState
) -> None:
    asked, told = threading.Event(), threading.Event()

    def load(_request: Any) -> Any:
        asked.set()
        told.wait(600)
        raise HubUnavailable("away")

    studio = Studio(tmp_path, load)
    job_id = studio.add(1)
    (studio.checkpoints.folder_of(job_id) / "step-00000001").mkdir(parents=True)
    studio.service.start()
    assert asked.wait(600)
    for wish in filter(None, (first, then)):
        if wish == "pause":
            studio.service.pause(job_id)
        else:
            studio.service.cancel(job_id, wish)  # type: ignore[arg-type]
    told.set()
    wait_until(lambda: studio.states() == [after])
    studio.close()
    assert studio.states() == [after]
    assert studio.checkpoints.folder_of(job_id).exists() == ("nothing" not in (first, then))


@pytest.mark.parametrize(
    ("error_class", "suggestions"),
    [("out_of_memory", ["batch_size=1 (needs less)"]), ("bad_data", ["look at row 3"])],
)
def test_what_the_engine_cannot_do_is_not_tried_again(tmp_path: Path, error_class: str, suggestions: list[str]) -> None:
    said = CommandFailed("it cannot", error_class=error_class, suggestions=["look at row 3"], log_tail=["last line"])
    studio = Studio(tmp_path, refuse(said))
    studio.add(1)
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.FAILED])
    studio.close()
    (job,) = studio.ledger.all()
    assert job.attempts == 1 and job.error is not None
    assert (job.error.error_class, job.error.suggestions) == (error_class, suggestions)
    assert job.error.log_tail == ["last line"]


def test_a_wish_that_came_too_late_for_its_run_is_obeyed_by_the_queue(tmp_path: Path) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("must not be loaded")))
    studio.add(1, state=JobState.INTERRUPTED, cancel_request="nothing")
    studio.add(2, cancel_request="checkpoints")
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.CANCELLED] * 2)
    studio.close()


def test_a_database_that_is_away_leaves_the_job_in_the_queue(tmp_path: Path) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("enough seen")))
    move, away = studio.ledger.move, [True, True]

    def sometimes(*arguments: Any, **columns: Any) -> bool:
        if away:
            away.pop()
            raise DatabaseUnavailable("away")
        return move(*arguments, **columns)

    studio.ledger.move = sometimes  # type: ignore[method-assign]
    studio.add(1)
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.FAILED])
    studio.close()
    (job,) = studio.ledger.all()
    assert job.error is not None and job.error.error_class == "model_rejected" and job.attempts == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, ("auto", "cpu", False, False)),
        (
            LoadOptions(engine="transformers", device=1, force=True, allow_pickle=True),
            ("transformers", 1, True, True),
        ),
    ],
)
def test_a_base_is_loaded_again_as_the_client_had_it_loaded(
    tmp_path: Path, options: LoadOptions | None, expected: tuple[Any, ...]
) -> None:
    seen: list[tuple[Any, ...]] = []

    def load(request: Any) -> Any:
        seen.append((request.engine, request.device, request.force, request.allow_pickle))
        raise ModelRejected("enough seen")

    studio = Studio(tmp_path, load)
    studio.add(1, loaded_model_id="mdl_gone", load_options=options)
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.FAILED])
    studio.close()
    assert seen == [expected]


def test_a_base_is_loaded_for_the_configuration_that_was_stored_and_no_other(tmp_path: Path) -> None:
    seen: list[Any] = []

    def load(request: Any) -> Any:
        seen.append(request.config)
        raise ModelRejected("enough seen")

    studio = Studio(tmp_path, load)
    stored = CONFIG.model_copy(update={"scheduler": "constant", "min_learning_rate_ratio": 0.5, "max_steps": 3})
    with pytest.raises(SettingRejected):  # by the rules of today
        configure(Algorithm.LORA, use_case=None, overrides=stored.model_dump(exclude={"epochs"}), machine=CPU)
    studio.add(1, config=stored.model_dump(mode="json"))
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.FAILED])
    studio.close()
    assert seen == [stored]


def test_a_move_that_went_through_unheard_is_not_made_twice(tmp_path: Path) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("enough seen")))
    move = studio.ledger.move

    def unheard(*arguments: Any, **columns: Any) -> bool:
        changed = move(*arguments, **columns)
        if changed:
            raise DatabaseUnavailable("away")
        return changed

    studio.ledger.move = unheard  # type: ignore[method-assign]
    job_id = studio.add(1)
    studio.service.start()
    wait_until(lambda: studio.states() == [JobState.FAILED])
    studio.close()
    states = [event.data["state"] for event in studio.ledger.events(job_id, 0, 10)]
    assert states == ["preparing", "failed"] and studio.ledger.get(job_id).attempts == 1


def test_an_event_that_was_written_unheard_is_not_written_twice(tmp_path: Path) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("no")), devices=())
    job_id = studio.add(1)

    def record(step: int, after: int) -> int:
        data = {"step": step, "loss": 0.1 + 0.2}
        return studio.ledger.record_event(job_id, "metrics", data, JobProgress(step=step), 0, after=after)

    first = record(1, after=0)
    studio.service.pause(job_id)  # another's event in between
    assert record(1, after=0) == first
    second = record(2, after=first)
    assert record(2, after=first) == second
    third = record(2, after=second)  # the same figures again are another event
    kinds = [(event.sequence, event.kind, event.data.get("step")) for event in studio.ledger.events(job_id, 0, 10)]
    assert kinds == [(1, "metrics", 1), (2, "state", None), (3, "metrics", 2), (4, "metrics", 2)]
    assert (second, third) == (3, 4)
    studio.close()


def test_an_event_whose_commit_nobody_answered_is_there_once_when_postgresql_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.database._CONNECT_WAITS_S", (0.0,))
    with postgres() as server, CommitCutter(server.port) as cutter:
        url = server.url.replace(str(server.port), str(cutter.port))
        studio = Studio(tmp_path, refuse(ModelRejected("no")), devices=(), url=url)
        job_id = studio.add(1)

        def record() -> int:
            return studio.ledger.record_event(
                job_id, "metrics", {"step": 1, "loss": 0.3}, JobProgress(step=1), 0, after=0
            )

        cutter.cut_next("after", then_away=True)
        for _ in range(2):  # nobody can say what became of the first; the second does not get through
            with pytest.raises(DatabaseUnavailable):
                record()
        cutter.back()
        assert record() == record() == 1
        assert [event.data["step"] for event in studio.ledger.events(job_id, 0, 10)] == [1]
        assert studio.ledger.get(job_id).progress == JobProgress(step=1)
        studio.close()


@pytest.mark.parametrize(
    ("state", "wish", "after"),
    [
        (JobState.RUNNING, None, JobState.INTERRUPTED),
        (JobState.PREPARING, None, JobState.INTERRUPTED),
        (JobState.PAUSING, None, JobState.PAUSED),
        (JobState.PAUSED, None, JobState.PAUSED),
        (JobState.RUNNING, "nothing", JobState.CANCELLED),
        (JobState.PAUSING, "checkpoints", JobState.CANCELLED),
    ],
)
def test_what_a_dead_server_left_is_taken_up(
    tmp_path: Path, state: JobState, wish: str | None, after: JobState
) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("no")), devices=())  # nobody works: what `start` does is all
    job_id = studio.add(1, state=state, cancel_request=wish)
    kept = studio.checkpoints.folder_of(job_id)
    (kept / "step-00000001").mkdir(parents=True)
    unknown = studio.checkpoints.folder_of("job_of_another_database") / "step-00000001"
    unknown.mkdir(parents=True)
    (kept / ".step-00000002.tmp").mkdir()
    studio.service.start()
    studio.close()
    assert studio.states() == [after]
    assert kept.exists() == (wish != "nothing")
    assert not (kept / ".step-00000002.tmp").exists()
    assert unknown.exists()


def test_a_job_that_the_server_dies_of_is_given_up(tmp_path: Path) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("no")), devices=())
    studio.add(1, state=JobState.RUNNING, stalls=4)
    studio.service.start()
    studio.close()
    (job,) = studio.ledger.all()
    assert job.state is JobState.FAILED and job.error is not None and job.error.error_class == "server_ended"


@pytest.mark.slow
def test_cancel_against_completion_ends_in_one_final_state_a_thousand_times(tmp_path: Path) -> None:
    studio = Studio(tmp_path, refuse(ModelRejected("no")), devices=())
    won = {JobState.SUCCEEDED: 0, JobState.CANCELLED: 0}
    for number in range(1, 1001):
        record = studio.ledger.get(studio.add(number, state=JobState.RUNNING))
        together = threading.Barrier(2)
        moved: list[JobState] = []

        def move(
            state: JobState, record: JobRecord = record, together: Any = together, moved: list[JobState] = moved
        ) -> None:
            together.wait()
            if studio.ledger.move(record, state):
                moved.append(state)

        threads = [threading.Thread(target=move, args=(state,)) for state in won]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(moved) == 1
        won[moved[0]] += 1
        assert studio.ledger.get(record.id).state is moved[0]
        assert [event.data["state"] for event in studio.ledger.events(record.id, 0, 10)] == [moved[0].value]
        with pytest.raises(TransitionNotPermitted):
            studio.service.cancel(record.id)
    assert sum(won.values()) == 1000 and set(studio.states()) <= FINAL_STATES
    studio.close()
