"""Faults, injected for real: processes killed at work."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rows import messages_jsonl
from server import BACKEND, StudioServer, start_server, wait_until
from tiny_model import TINY_ID

pytestmark = pytest.mark.engine
ENDLESS = {"max_steps": 1_000_000, "max_seq_length": 64}


def _training(studio: StudioServer) -> tuple[str, psutil.Process]:
    dataset = studio.upload(messages_jsonl())
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides=ENDLESS)
    studio.wait_for_step(job["id"], 3)
    (engine,) = studio.engines()
    return job["id"], engine


def test_kill_9_of_the_engine_interrupts_the_job_and_the_server_answers_on(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs) as studio:
        job_id, engine = _training(studio)
        engine.send_signal(signal.SIGKILL)
        studio.events(job_id)
        job = studio.job(job_id)
        assert job["state"] == "interrupted"
        assert (job["error"]["signal"], job["error"]["class"]) == (9, "engine_killed")
        assert job["error"]["log_tail"]
        assert studio.http.get("/api/hardware/profile").status_code == 200
        assert not psutil.pid_exists(engine.pid) and studio.engines() == []
        (model,) = studio.http.get("/api/peft/loaded-models").json()["models"]
        assert model["state"] == "failed" and model["memory"]["measured_bytes"] is None

        assert studio.http.post(f"/api/training/jobs/{job_id}/resume").status_code == 202
        studio.wait_for_step(job_id, 2)
        assert studio.job(job_id)["attempts"] == 2
        studio.http.post(f"/api/training/jobs/{job_id}/cancel")
        studio.events(job_id)
        assert studio.job(job_id)["state"] == "cancelled"


def test_kill_9_of_the_server_leaves_no_engine_and_loses_no_event(tmp_path: Path, model_dirs: Path) -> None:
    studio = start_server(tmp_path, model_dirs).start()
    job_id, engine = _training(studio)
    known = studio.http.get(f"/api/training/jobs/{job_id}/events", params={"format": "json"}).json()["events"]
    studio.kill()
    wait_until(lambda: not psutil.pid_exists(engine.pid))

    with studio as restarted:
        job = restarted.job(job_id)
        assert (job["state"], job["error"]["class"]) == ("interrupted", "server_ended")
        after = restarted.http.get(f"/api/training/jobs/{job_id}/events", params={"format": "json"}).json()["events"]
        assert after[: len(known)] == known and after[-1]["data"]["state"] == "interrupted"


def test_sigterm_during_a_job_ends_everything_and_says_so(tmp_path: Path, model_dirs: Path) -> None:
    studio = start_server(tmp_path, model_dirs).start()
    job_id, engine = _training(studio)
    assert studio.stop() == -signal.SIGTERM  # uvicorn shuts down in order, then dies of the signal it was sent
    assert not psutil.pid_exists(engine.pid)
    with studio as restarted:
        job = restarted.job(job_id)
        assert (job["state"], job["error"]["class"]) == ("interrupted", "server_ended")


def test_a_second_server_on_the_same_data_names_the_first(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs) as studio:
        second = start_server(tmp_path, model_dirs)
        done = subprocess.run(
            [sys.executable, "main.py"],
            cwd=BACKEND,
            env=second._environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 2
        assert f"pid {studio.pid}" in done.stderr


def test_beyond_loopback_without_a_key_it_does_not_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=BACKEND,
        env={"PATH": "", "PEFT_STUDIO_HOME": str(tmp_path), "PEFT_STUDIO_HOST": "0.0.0.0"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "PEFT_STUDIO_API_KEY" in done.stderr


def test_a_taken_port_is_said_within_seconds(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path / "one", model_dirs) as studio:
        second = start_server(tmp_path / "two", model_dirs)
        environment = second._environment | {"PEFT_STUDIO_PORT": str(studio.port)}
        done = subprocess.run(
            [sys.executable, "main.py"], cwd=BACKEND, env=environment, capture_output=True, text=True, timeout=30
        )
        assert done.returncode != 0
        assert "address already in use" in done.stderr
