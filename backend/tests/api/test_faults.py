"""Faults, injected for real: processes killed at work."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.rows import messages_jsonl
from tests.support.server import BACKEND, StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
ENDLESS = {"max_steps": 1_000_000, "max_seq_length": 64}


def _training(studio: StudioServer, **body: str) -> tuple[str, psutil.Process]:
    dataset = studio.upload(messages_jsonl())
    job = studio.submit(dataset_id=dataset["id"], overrides=ENDLESS, **body)
    studio.wait_for_step(job["id"], 3)
    (engine,) = studio.engines()
    return job["id"], engine


def _interruptions(studio: StudioServer, job_id: str) -> list[dict[str, Any]]:
    events = studio.http.get(f"/api/training/jobs/{job_id}/events", params={"format": "json"}).json()["events"]
    return [event["data"]["error"] for event in events if event["data"].get("state") == "interrupted"]


def test_kill_9_of_the_engine_of_a_loaded_model_is_said_and_the_job_goes_on_in_another(
    tmp_path: Path, model_dirs: Path
) -> None:
    with start_server(tmp_path, model_dirs) as studio:
        loaded = studio.load(TINY_ID, overrides={"max_seq_length": 64})
        job_id, engine = _training(studio, loaded_model_id=loaded["id"])
        engine.send_signal(signal.SIGKILL)
        wait_until(lambda: _interruptions(studio, job_id) != [])
        (error,) = _interruptions(studio, job_id)
        assert (error["signal"], error["class"]) == (9, "engine_killed") and error["log_tail"]
        assert studio.http.get("/api/hardware/profile").status_code == 200
        assert not psutil.pid_exists(engine.pid)
        model = studio.http.get(f"/api/peft/loaded-models/{loaded['id']}").json()
        assert model["state"] == "failed" and model["memory"]["measured_bytes"] is None

        studio.wait_for_state(job_id, "running")
        assert studio.job(job_id)["attempts"] == 2 and studio.engine().pid != engine.pid
        studio.http.post(f"/api/training/jobs/{job_id}/cancel")
        studio.wait_for_state(job_id, "cancelled")


def test_kill_9_of_the_server_leaves_no_engine_and_loses_no_event(tmp_path: Path, model_dirs: Path) -> None:
    studio = start_server(tmp_path, model_dirs).start()
    job_id, engine = _training(studio, model_id=TINY_ID)
    known = studio.http.get(f"/api/training/jobs/{job_id}/events", params={"format": "json"}).json()["events"]
    studio.kill()
    wait_until(lambda: not psutil.pid_exists(engine.pid))

    with studio as restarted:
        after = restarted.http.get(f"/api/training/jobs/{job_id}/events", params={"format": "json"}).json()["events"]
        assert after[: len(known)] == known
        states = [event["data"] for event in after if event["kind"] == "state"]
        assert {"interrupted", "queued"} <= {data["state"] for data in states}
        restarted.http.post(f"/api/training/jobs/{job_id}/cancel")
        restarted.wait_for_state(job_id, "cancelled")


def test_sigterm_ends_everything_and_the_exit_code_says_so(tmp_path: Path, model_dirs: Path) -> None:
    studio = start_server(tmp_path, model_dirs).start()
    _, engine = _training(studio, model_id=TINY_ID)
    assert studio.stop() == -signal.SIGTERM  # uvicorn shuts down in order, then dies of the signal it was sent
    assert not psutil.pid_exists(engine.pid)


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


def test_a_data_directory_that_is_read_only_is_said_within_seconds(small_disk: Path, model_dirs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    environment = start_server(small_disk / "home", model_dirs)._environment
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=BACKEND, env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr and str(small_disk) in done.stderr


@pytest.mark.slow
def test_a_clock_that_jumps_a_day_ends_nothing(tmp_path: Path, model_dirs: Path) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    faked = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with start_server(tmp_path / "home", model_dirs, **faked) as studio:
        job_id, engine = _training(studio, model_id=TINY_ID)
        for jump in ("+1d", "-1d", "+0"):
            offset.write_text(jump)
            before = studio.job(job_id)["progress"]["step"]
            wait_until(lambda before=before: studio.job(job_id)["progress"]["step"] > before + 20)
            assert studio.http.get("/api/hardware/profile").json()["age_s"] < 300
        job = studio.job(job_id)
        assert (job["state"], job["attempts"]) == ("running", 1) and engine.is_running()
        assert 0 <= job["progress"]["eta_s"] < 10**9
