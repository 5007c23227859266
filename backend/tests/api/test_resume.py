"""A job that is cut off, by whatever, ends where the uninterrupted one does: every loss and every bit."""

import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from store.database import Database
from store.repositories import Jobs
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.small_disk import fill
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
HARD = {
    "max_steps": 120,
    "max_seq_length": 64,
    "dropout": 0.2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "warmup_ratio": 0.2,
    "learning_rate": 1e-2,
    "eval_every_steps": 20,
    "checkpoint_every_steps": 7,
}


@dataclass(frozen=True)
class Reference:
    """What the uninterrupted run gave."""

    losses: dict[int, float]
    weights: bytes


@pytest.fixture(scope="module")
def reference(studio: StudioServer) -> Reference:
    job_id = submit(studio)
    studio.events(job_id)
    return Reference(studio.metrics(job_id), studio.adapter_weights(studio.job(job_id)["adapter_id"]))


@pytest.fixture
def own(tmp_path: Path, model_dirs: Path) -> Iterator[StudioServer]:
    with start_server(tmp_path, model_dirs) as server:
        yield server


def submit(studio: StudioServer, **body: Any) -> str:
    dataset = studio.upload(messages_jsonl())
    request = {"model_id": TINY_ID, "dataset_id": dataset["id"], "validation_fraction": 0.2, "overrides": HARD}
    return str(studio.submit(**request | body)["id"])


def check_end(studio: StudioServer, job_id: str, reference: Reference) -> dict[str, Any]:
    """The job has succeeded, and nothing in it tells that it was cut off but what says so."""
    events = studio.events(job_id)
    assert [sequence for sequence, _ in events] == list(range(1, len(events) + 1))
    job = studio.job(job_id)
    assert job["state"] == "succeeded", job["error"]
    assert studio.metrics(job_id) == reference.losses
    assert studio.adapter_weights(job["adapter_id"]) == reference.weights
    return job


def kill_engine(studio: StudioServer) -> None:
    studio.engine().send_signal(signal.SIGKILL)


def kill_server(studio: StudioServer) -> None:
    studio.kill()
    studio.start()


def kill_both(studio: StudioServer) -> None:
    engine = studio.engine()
    studio.kill()
    engine.send_signal(signal.SIGKILL)
    studio.start()


def terminate_server(studio: StudioServer) -> None:
    engine = studio.engine()
    studio.stop()
    assert not psutil.pid_exists(engine.pid)
    studio.start()


def test_a_run_killed_in_every_way_goes_on_by_itself_to_the_same_end(own: StudioServer, reference: Reference) -> None:
    job_id = submit(own)
    for step, fault in ((10, kill_engine), (40, kill_server), (70, terminate_server), (95, kill_both)):
        own.wait_for_step(job_id, step)
        fault(own)
    job = check_end(own, job_id, reference)
    assert job["attempts"] == 5 and job["error"] is None
    states = [event["data"] for event in _events(own, job_id) if event["kind"] == "state"]
    causes = [data["error"]["class"] for data in states if data["state"] == "interrupted"]
    assert causes == ["engine_killed", "server_ended", "server_ended", "server_ended"]
    started = [event["data"] for event in _events(own, job_id) if event["kind"] == "started"]
    first, *later = [data["resumed_from_step"] for data in started]
    # Killed, a run goes on from the last multiple of seven; ended in order, from where it was.
    assert first is None and all(found >= least for found, least in zip(later, (7, 35, 70, 91), strict=True))
    (model,) = own.http.get("/api/peft/loaded-models").json()["models"]
    assert model["state"] == "ready"


def _events(studio: StudioServer, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["sequence"] if found else 0
        page = studio.http.get(f"/api/training/jobs/{job_id}/events", params={"format": "json", "after": after})
        if not page.json()["events"]:
            return found
        found += page.json()["events"]


def test_a_frozen_engine_is_ended_and_its_job_goes_on(tmp_path: Path, model_dirs: Path, reference: Reference) -> None:
    with start_server(tmp_path, model_dirs, PEFT_STUDIO_ENGINE_SILENCE_S="6") as studio:
        job_id = submit(studio)
        studio.wait_for_step(job_id, 20)
        frozen = studio.engine()
        frozen.send_signal(signal.SIGSTOP)
        wait_until(lambda: not psutil.pid_exists(frozen.pid))
        check_end(studio, job_id, reference)
        (cause,) = [
            event["data"]["error"] for event in _events(studio, job_id) if event["data"].get("state") == "interrupted"
        ]
        assert (cause["class"], cause["signal"]) == ("engine_unresponsive", 9) and "6 s of silence" in cause["message"]


def test_a_frozen_server_does_not_take_its_engine_for_dead(tmp_path: Path, model_dirs: Path) -> None:
    """Stopped together, as a terminal's Ctrl-Z or a sleeping container does."""
    with start_server(tmp_path, model_dirs, PEFT_STUDIO_ENGINE_SILENCE_S="4") as studio:
        job_id = submit(studio, overrides=HARD | {"max_steps": 100_000, "checkpoint_every_steps": None})
        studio.wait_for_step(job_id, 5)
        processes = [studio.engine(), psutil.Process(studio.pid)]
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(6)  # longer than the silence that ends an engine: the fault itself
        for process in reversed(processes):
            process.send_signal(signal.SIGCONT)
        steps = len(studio.metrics(job_id))
        wait_until(lambda: len(studio.metrics(job_id)) > steps + 20)
        assert studio.job(job_id)["attempts"] == 1
        studio.http.post(f"/api/training/jobs/{job_id}/cancel")


def test_a_pause_survives_a_restart_and_resume_ends_the_same(own: StudioServer, reference: Reference) -> None:
    job_id = submit(own)
    own.wait_for_step(job_id, 30)
    assert own.http.post(f"/api/training/jobs/{job_id}/pause").json()["state"] in ("pausing", "paused")
    job = own.wait_for_state(job_id, "paused")
    assert own.http.post(f"/api/training/jobs/{job_id}/pause").status_code == 409
    found = own.http.get(f"/api/training/jobs/{job_id}/checkpoints", params={"verify": True}).json()["checkpoints"]
    assert len(found) == 2 and found[-1]["step"] == job["progress"]["step"]
    assert all(facts["problem"] is None and facts["size_bytes"] > 0 for facts in found)
    own.stop()
    own.start()
    assert own.job(job_id)["state"] == "paused"  # nobody asked for it to go on
    assert own.http.post(f"/api/training/jobs/{job_id}/resume").status_code == 202
    check_end(own, job_id, reference)


def test_a_queued_job_is_paused_at_once_and_shows_its_place(studio: StudioServer) -> None:
    running = submit(studio, overrides=HARD | {"max_steps": 10**6})
    studio.wait_for_step(running, 2)
    waiting, later = submit(studio), submit(studio)
    assert studio.job(waiting)["queue"]["position"] == 1 and studio.job(later)["queue"]["position"] == 2
    assert studio.job(waiting)["queue"]["estimated_start_at"] > studio.job(waiting)["created_at"]
    assert studio.job(later)["queue"]["estimated_start_at"] is None and studio.job(running)["queue"] is None
    urgent = submit(studio, priority=5)
    assert [studio.job(job)["queue"]["position"] for job in (urgent, waiting, later)] == [1, 2, 3]
    assert studio.http.post(f"/api/training/jobs/{waiting}/pause").json()["state"] == "paused"
    for job_id in (running, waiting, later, urgent):
        studio.http.post(f"/api/training/jobs/{job_id}/cancel")
        studio.wait_for_state(job_id, "cancelled")


def test_a_queued_job_runs_as_it_was_configured_though_the_rules_refuse_it_by_now(own: StudioServer) -> None:
    running = submit(own, overrides=HARD | {"max_steps": 10**6})
    own.wait_for_step(running, 2)
    waiting = submit(own, overrides=HARD | {"max_steps": 4, "scheduler": "constant", "warmup_ratio": 0.0})
    assert own.http.post(f"/api/training/jobs/{waiting}/pause").json()["state"] == "paused"
    own.http.post(f"/api/training/jobs/{running}/cancel")
    own.wait_for_state(running, "cancelled")
    own.stop()
    refused_by_now = {"scheduler": "constant", "min_learning_rate_ratio": 0.5}
    database = Database(f"sqlite:///{own.home / 'studio.db'}")
    with database.begin() as connection:  # as a former version may have accepted it
        record = Jobs(connection).get(waiting)
        assert record is not None and record.attempts == 0
        config = record.config | refused_by_now
        Jobs(connection).set(waiting, config=config)
    database.close()
    own.start()
    assert own.http.post("/api/peft/configure", json={"overrides": refused_by_now}).status_code == 422
    assert own.http.post(f"/api/training/jobs/{waiting}/resume").status_code == 202
    own.events(waiting)
    job = own.job(waiting)
    assert job["state"] == "succeeded", job["error"]
    assert job["config"] == config == own.http.get(f"/api/adapters/{job['adapter_id']}").json()["config"]
    assert sorted(own.metrics(waiting)) == [1, 2, 3, 4]


def test_a_checkpoint_on_demand_and_what_cancelling_keeps(studio: StudioServer) -> None:
    endless = HARD | {"max_steps": 10**6, "checkpoint_every_steps": None}

    def checkpoints(job_id: str) -> list[dict[str, Any]]:
        return list(studio.http.get(f"/api/training/jobs/{job_id}/checkpoints").json()["checkpoints"])

    job_id = submit(studio, overrides=endless)
    assert studio.http.post(f"/api/training/jobs/{job_id}/checkpoint").status_code in (202, 409)
    studio.wait_for_step(job_id, 3)
    assert studio.http.post(f"/api/training/jobs/{job_id}/checkpoint").status_code == 202
    wait_until(lambda: len(checkpoints(job_id)) > 0)
    studio.http.post(f"/api/training/jobs/{job_id}/cancel")
    studio.wait_for_state(job_id, "cancelled")
    wait_until(lambda: checkpoints(job_id) == [])
    assert studio.http.post(f"/api/training/jobs/{job_id}/checkpoint").status_code == 409

    job_id = submit(studio, overrides=endless)
    studio.wait_for_step(job_id, 3)
    studio.http.post(f"/api/training/jobs/{job_id}/cancel", json={"keep": "adapter"})
    job = studio.wait_for_state(job_id, "cancelled")
    assert job["adapter_id"] is not None and job["metrics"]["adapter_step"] == job["progress"]["step"]
    assert studio.adapter_weights(job["adapter_id"])

    job_id = submit(studio, overrides=endless)
    studio.wait_for_step(job_id, 3)
    studio.http.post(f"/api/training/jobs/{job_id}/cancel", json={"keep": "checkpoints"})
    studio.wait_for_state(job_id, "cancelled")
    (kept,) = checkpoints(job_id)
    assert studio.http.delete(f"/api/training/jobs/{job_id}").status_code == 204
    assert kept["step"] >= 3 and not (studio.home / "checkpoints" / job_id).exists()
    refused = studio.http.post("/api/training/jobs/none/cancel", json={"keep": "everything"})
    assert refused.status_code == 422


def test_a_new_job_begins_with_the_checkpoint_of_another(studio: StudioServer, reference: Reference) -> None:
    first = submit(studio, overrides=HARD | {"max_steps": 10**6, "scheduler": "constant"})
    studio.wait_for_step(first, 15)
    studio.http.post(f"/api/training/jobs/{first}/cancel", json={"keep": "checkpoints"})
    job = studio.wait_for_state(first, "cancelled")
    again = {"dataset_id": job["dataset_id"], "resume_from": first}
    second = submit(studio, **again, overrides=HARD | {"max_steps": 80, "scheduler": "constant"})
    studio.events(second)
    found = studio.job(second)
    step = job["progress"]["step"]
    assert found["resumed_from"] == f"{first}/step-{step:08d}"
    assert found["state"] == "succeeded", found["error"]
    assert sorted(studio.metrics(second)) == list(range(step + 1, 81))

    for body, status, word in (
        (again | {"overrides": HARD | {"rank": 2, "scheduler": "constant"}}, 422, "rank was 16, not 2"),
        ({"resume_from": first, "overrides": HARD | {"scheduler": "constant"}}, 422, "dataset_id was"),
        (again | {"overrides": HARD | {"max_steps": step, "scheduler": "constant"}}, 422, "adds none"),
        (again | {"resume_from": f"{first}/step-00000000"}, 404, "no checkpoint step-00000000"),
        (again | {"resume_from": "job_none"}, 404, "job_none"),
        (again | {"resume_from": "../../etc"}, 422, "resume_from"),
    ):
        dataset = studio.upload(messages_jsonl())["id"]
        request = {"model_id": TINY_ID, "dataset_id": dataset, "validation_fraction": 0.2, "overrides": HARD} | body
        response = studio.http.post("/api/training/jobs", json=request)
        assert (response.status_code, word in response.json()["detail"]) == (status, True), response.text


def test_a_reader_that_stops_reading_holds_nobody_up_and_misses_nothing(own: StudioServer) -> None:
    dataset = own.upload(messages_jsonl())
    job_id = own.submit(
        model_id=TINY_ID, dataset_id=dataset["id"], overrides={"max_steps": 300, "max_seq_length": 64, "batch_size": 1}
    )["id"]
    request = f"GET /api/training/jobs/{job_id}/events HTTP/1.0\r\nHost: 127.0.0.1:{own.port}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", own.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(request.encode())
        own.events(job_id)  # another reader follows the job to its end meanwhile
        assert own.job(job_id)["state"] == "succeeded"
        slow.settimeout(60)
        text = b"".join(iter(lambda: slow.recv(65536), b"")).decode()
    ids = [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]
    assert len(ids) > 300 and ids == list(range(1, len(ids) + 1))


def test_an_engine_that_dies_again_and_again_without_progress_fails_its_job(own: StudioServer) -> None:
    job_id = submit(own, overrides=HARD | {"max_steps": 10**6, "checkpoint_every_steps": None})
    began = time.monotonic()
    for _ in range(5):
        own.engine().send_signal(signal.SIGKILL)
        wait_until(lambda: own.engines() == [])
    job = own.wait_for_state(job_id, "failed")
    assert time.monotonic() - began >= 1 + 2 + 4 + 8  # the waits grow
    assert (job["attempts"], job["error"]["class"], job["error"]["signal"]) == (5, "engine_killed", 9)
    assert "5th time" in job["error"]["message"]


def test_a_full_disk_pauses_the_job_and_reads_live_on(small_disk: Path, model_dirs: Path, reference: Reference) -> None:
    with start_server(small_disk, model_dirs) as studio:
        job_id = submit(studio)
        studio.wait_for_step(job_id, 20)
        ballast = fill(small_disk)
        wait_until(lambda: studio.http.get("/api/training/jobs").status_code == 200)

        def upload() -> httpx.Response:
            fill(small_disk)  # what the job deletes where it cannot go on is room again
            return studio.http.post("/api/datasets", files={"file": ("d.jsonl", messages_jsonl(400).encode())})

        wait_until(lambda: upload().status_code == 507)
        assert upload().json()["type"] == "/problems/storage-full"
        assert studio.http.get("/api/hardware/profile").status_code == 200
        while True:
            time.sleep(3)  # the job goes on until it has something to write
            ballast.unlink()
            time.sleep(1)
            if studio.job(job_id)["state"] != "running":
                break
            fill(small_disk)
        job = studio.wait_for_state(job_id, "paused")
        assert job["error"]["class"] == "disk_full" and job["error"]["suggestions"]
        assert not list(small_disk.rglob("*.tmp"))
        assert studio.http.post(f"/api/training/jobs/{job_id}/resume").status_code == 202
        check_end(studio, job_id, reference)
