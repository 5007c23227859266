"""Long fault runs: `make test-slow`."""

import random
import signal
from pathlib import Path

import pytest
from rows import messages_jsonl
from server import start_server
from tiny_model import TINY_ID

KILLS = 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_engine_killed_at_random_steps_is_always_said_and_never_left_behind(
    tmp_path: Path, model_dirs: Path
) -> None:
    chance = random.Random(0)
    with start_server(tmp_path, model_dirs) as studio:
        dataset = studio.upload(messages_jsonl())
        job = studio.submit(
            model_id=TINY_ID, dataset_id=dataset["id"], overrides={"max_steps": 10**6, "max_seq_length": 64}
        )
        for kill in range(1, KILLS + 1):
            # The stream is replayed from the start: wait for a step of this attempt, not of one before.
            before = studio.http.get(f"/api/training/jobs/{job['id']}/metrics").json()["metrics"]
            wanted = len(before) + chance.randint(1, 30)
            while len(studio.http.get(f"/api/training/jobs/{job['id']}/metrics").json()["metrics"]) < wanted:
                assert studio.job(job["id"])["state"] in ("queued", "preparing", "running")
            (engine,) = studio.engines()
            engine.send_signal(signal.SIGKILL)
            events = studio.events(job["id"])
            assert [sequence for sequence, _ in events] == list(range(1, len(events) + 1))
            state = studio.job(job["id"])
            assert (state["state"], state["error"]["signal"], state["attempts"]) == ("interrupted", 9, kill)
            assert studio.engines() == []
            assert studio.http.post(f"/api/training/jobs/{job['id']}/resume").status_code == 202
        studio.http.post(f"/api/training/jobs/{job['id']}/cancel")
        studio.events(job["id"])
        assert studio.job(job["id"])["state"] == "cancelled"
