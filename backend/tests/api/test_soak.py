"""Long fault runs, `make test-slow`: engines and servers killed at random under a model of the job API.

PEFT_STUDIO_SOAK_KILLS says how many kills each database gets (100 by default).
"""

import hashlib
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from domain.jobs.states import FINAL_STATES, JobState
from store.database import Database
from tests.support.postgres import postgres
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID

KILLS = int(os.environ.get("PEFT_STUDIO_SOAK_KILLS", "100"))
FINAL = {state.value for state in FINAL_STATES}
CONFIG = {
    "max_steps": 60,
    "max_seq_length": 64,
    "dropout": 0.2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "warmup_ratio": 0.2,
    "learning_rate": 1e-2,
    "eval_every_steps": 15,
    "checkpoint_every_steps": 4,
}
MUST_BE_ZERO = ("acknowledged writes lost", "jobs run twice", "orphans", "curves or adapters that differ")
counts: Counter[str] = Counter()


class JobApi(RuleBasedStateMachine):
    """What clients were told must stay true, whoever is killed when."""

    model_dirs: ClassVar[Path]
    environment: ClassVar[dict[str, str]]
    reference: ClassVar[tuple[dict[int, float], bytes]]

    def __init__(self) -> None:
        super().__init__()
        _empty(self.environment)
        self.folder = tempfile.TemporaryDirectory(prefix="peft-studio-soak-")
        self.studio = start_server(Path(self.folder.name), self.model_dirs, **self.environment).start()
        self.in_a_row = 0
        self.final: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.unfinished: dict[str, str] = {}  # job → what was acknowledged last: run, pause or cancel

    def call(self, path: str, **body: Any) -> httpx.Response:
        return self.studio.http.post(f"/api/training/jobs{path}", json=body or None)

    @initialize()
    def upload(self) -> None:
        self.dataset = self.studio.upload(messages_jsonl())["id"]

    # What clients do

    @precondition(lambda self: len(self.unfinished) < 3)
    @rule()
    def submit(self) -> None:
        key = f"key-{len(self.keys)}"
        request = {
            "model_id": TINY_ID,
            "dataset_id": self.dataset,
            "validation_fraction": 0.2,
            "overrides": CONFIG,
            "idempotency_key": key,
        }
        job_id = self.call("", **request).json()["id"]
        assert self.call("", **request).json()["id"] == job_id
        self.keys[key] = job_id
        self.unfinished[job_id] = "run"
        counts["jobs"] += 1

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.unfinished)))
        if self.call(f"/{job_id}/pause").status_code == 202 and self.unfinished[job_id] == "run":
            self.unfinished[job_id] = "pause"

    @precondition(lambda self: "pause" in self.unfinished.values())
    @rule()
    def resume(self) -> None:
        for job_id, wish in self.unfinished.items():
            if wish == "pause" and self.call(f"/{job_id}/resume").status_code == 202:
                self.unfinished[job_id] = "run"

    @precondition(lambda self: len(self.unfinished) > 1)
    @rule(data=st.data(), keep=st.sampled_from(["nothing", "checkpoints"]))
    def cancel(self, data: st.DataObject, keep: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.unfinished)))
        if self.call(f"/{job_id}/cancel", keep=keep).status_code == 202:
            self.unfinished[job_id] = "cancel"

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        self.call(f"/{data.draw(st.sampled_from(sorted(self.unfinished)))}/checkpoint")

    @precondition(lambda self: "run" in self.unfinished.values())
    @rule(steps=st.integers(5, 40))
    def let_it_train(self, steps: int) -> None:
        self.in_a_row = 0

        def recorded() -> int:
            return sum(len(self.studio.metrics(job_id)) for job_id in self.unfinished)

        wanted = recorded() + steps
        wait_until(lambda: recorded() >= wanted or not self._runs())

    def _runs(self) -> bool:
        states = [self.studio.job(job_id)["state"] for job_id in self.unfinished]
        return any(state not in FINAL and state != "paused" for state in states)

    # What happens to them

    # Five deaths without a checkpoint in between end a job, rightly; so it gets to write one.

    @precondition(lambda self: self.unfinished and self.in_a_row < 3)
    @rule(after_s=st.floats(0, 1.5))
    def kill_the_engine(self, after_s: float) -> None:
        for engine in self._engines(after_s):
            if engine.is_running():
                engine.send_signal(signal.SIGKILL)
        self._count("engine")

    @precondition(lambda self: self.unfinished and self.in_a_row < 3)
    @rule(after_s=st.floats(0, 1.5))
    def kill_the_server(self, after_s: float) -> None:
        engines = self._engines(after_s)
        self.studio.kill()
        self._start_again(engines)
        self._count("server")

    @precondition(lambda self: self.unfinished and self.in_a_row < 3)
    @rule(after_s=st.floats(0, 1.5))
    def kill_both(self, after_s: float) -> None:
        engines = self._engines(after_s)
        self.studio.kill()
        for engine in engines:
            if engine.is_running():
                engine.send_signal(signal.SIGKILL)
        self._start_again(engines)
        self._count("both")

    @precondition(lambda self: self.unfinished and self.in_a_row < 3)
    @rule(after_s=st.floats(0, 1.5))
    def stop_the_server(self, after_s: float) -> None:
        engines = self._engines(after_s)
        self.studio.stop()
        self._start_again(engines)
        counts["stops in order"] += 1
        self.in_a_row += 1

    def _engines(self, after_s: float) -> list[psutil.Process]:
        wait_until(lambda: bool(self.studio.engines()) or not self._runs())
        # The fault comes at any moment of a run, not only at those that a client can see.
        time.sleep(after_s)
        return self.studio.engines()

    def _start_again(self, engines: list[psutil.Process]) -> None:
        wait_until(lambda: not any(psutil.pid_exists(engine.pid) for engine in engines))
        self.studio.start()

    def _count(self, who: str) -> None:
        self.in_a_row += 1
        counts["kills"] += 1
        counts[f"kills of {who}"] += 1

    # What must hold

    @invariant()
    def nothing_that_was_acknowledged_is_lost(self) -> None:
        listed = {job["id"]: job for job in self.studio.http.get("/api/training/jobs").json()["jobs"]}
        lost = set(self.keys.values()) - set(listed)
        counts["acknowledged writes lost"] += len(lost)
        assert not lost and len(listed) == len(self.keys)
        for job_id, job in self.final.items():
            assert listed[job_id]["state"] == job["state"], "a final state changed"
        for job_id in [job_id for job_id in self.unfinished if listed[job_id]["state"] in FINAL]:
            self._check_end(listed[job_id], self.unfinished.pop(job_id))
        assert len(self.studio.engines()) <= 2  # one that trains, one that is being replaced

    def _check_end(self, job: dict[str, Any], wish: str) -> None:
        self.final[job["id"]] = job
        sequences = [event["sequence"] for event in self._events(job["id"])]
        assert sequences == list(range(1, len(sequences) + 1))
        ends = [event for event in self._events(job["id"]) if event["data"].get("state") in FINAL]
        counts["jobs run twice"] += len(ends) - 1
        assert len(ends) == 1
        if job["state"] == "cancelled":
            counts["acknowledged writes lost"] += wish != "cancel"
            assert wish == "cancel"
            return
        assert job["state"] == JobState.SUCCEEDED, job["error"]
        counts["jobs succeeded"] += 1
        weights = self.studio.adapter_weights(job["adapter_id"])
        counts[f"adapters {hashlib.sha256(weights).hexdigest()[:16]}"] += 1
        same = (self.studio.metrics(job["id"]), weights) == self.reference
        counts["curves or adapters that differ"] += not same
        assert same

    def _events(self, job_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            query = {"format": "json", "after": found[-1]["sequence"] if found else 0}
            page = self.studio.http.get(f"/api/training/jobs/{job_id}/events", params=query).json()["events"]
            if not page:
                return found
            found += page

    def teardown(self) -> None:
        if hasattr(self, "dataset"):
            self.resume()
            for job_id, wish in list(self.unfinished.items()):
                if wish == "pause":
                    self.call(f"/{job_id}/resume")
                    self.unfinished[job_id] = "run"
            wait_until(lambda: not self._runs())
            for job_id in self.unfinished:
                if self.studio.job(job_id)["state"] == "paused":
                    self.call(f"/{job_id}/resume")
            wait_until(lambda: not self._runs())
            self.nothing_that_was_acknowledged_is_lost()
        pid = self.studio.pid
        engines = self.studio.engines()
        self.studio.stop()
        left = [engine for engine in engines if psutil.pid_exists(engine.pid)]
        counts["orphans"] += len(left)
        assert not left and not psutil.pid_exists(pid)
        self.studio.http.close()
        self.folder.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def environment(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    if request.param == "sqlite":
        yield {}
        return
    with postgres() as server:
        yield {"PEFT_STUDIO_DATABASE_URL": server.url}


def _empty(environment: dict[str, str]) -> None:
    if environment:
        database = Database(environment["PEFT_STUDIO_DATABASE_URL"])
        with database.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        database.close()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_whoever_is_killed_nothing_acknowledged_is_lost_and_every_curve_is_the_same(
    studio: StudioServer, model_dirs: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job = studio.submit(
        model_id=TINY_ID,
        dataset_id=studio.upload(messages_jsonl())["id"],
        validation_fraction=0.2,
        overrides=CONFIG,
    )
    studio.events(job["id"])
    JobApi.reference = studio.metrics(job["id"]), studio.adapter_weights(studio.job(job["id"])["adapter_id"])
    JobApi.model_dirs, JobApi.environment = model_dirs, environment
    counts.clear()
    with capsys.disabled():
        print(f"\nuninterrupted: {hashlib.sha256(JobApi.reference[1]).hexdigest()[:16]}")  # noqa: T201
    while counts["kills"] < KILLS:
        run_state_machine_as_test(
            JobApi,
            settings=settings(
                max_examples=4,  # the first is always the simplest, in which nobody is killed
                stateful_step_count=40,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
        found = dict(counts) | {name: counts[name] for name in MUST_BE_ZERO}
        with capsys.disabled():
            print(f"\n{'PostgreSQL' if environment else 'SQLite'}: {found}")  # noqa: T201 - the table that it is for
    assert all(counts[name] == 0 for name in MUST_BE_ZERO)
