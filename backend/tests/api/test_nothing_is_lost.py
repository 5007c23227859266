"""What fails after the last step pauses the job; once it is mended, the adapter is handed out as it was trained."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
SETTINGS: dict[str, Any] = {"max_steps": 60, "max_seq_length": 64, "batch_size": 2, "checkpoint_every_steps": None}


def submit(studio: StudioServer, **overrides: Any) -> tuple[str, Path]:
    """Submit a job; return it, and the path of what would keep its adapter from being written."""
    dataset = studio.upload(messages_jsonl())
    request = {"model_id": TINY_ID, "dataset_id": dataset["id"], "overrides": SETTINGS | overrides}
    job_id = str(studio.submit(**request)["id"])
    return job_id, studio.home / "adapters" / f".adp_{job_id.removeprefix('job_')}.tmp"


def test_a_job_whose_adapter_could_not_be_written_is_taken_up_without_training(studio: StudioServer) -> None:
    straight, _ = submit(studio)
    studio.events(straight)
    job_id, obstacle = submit(studio)
    obstacle.write_text("a file where a folder is to be made")
    job = studio.wait_for_state(job_id, "paused", "failed", "succeeded")
    assert job["state"] == "paused" and job["error"]["class"] == "cannot_save", job
    assert "ended after step 60" in job["error"]["message"] and "FileExistsError" in job["error"]["message"]
    assert "resume the job" in job["error"]["suggestions"][0]
    (kept,) = studio.http.get(f"/api/training/jobs/{job_id}/checkpoints", params={"verify": True}).json()["checkpoints"]
    assert (kept["step"], kept["problem"]) == (60, None)

    studio.http.post(f"/api/training/jobs/{job_id}/resume")  # nothing is mended yet
    studio.wait_for_state(job_id, "paused")
    obstacle.unlink()
    assert studio.http.post(f"/api/training/jobs/{job_id}/resume").status_code == 202
    job = studio.wait_for_state(job_id, "succeeded", "failed")
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert studio.metrics(job_id) == studio.metrics(straight)  # each step once
    weights = studio.adapter_weights(studio.job(straight)["adapter_id"])
    assert studio.adapter_weights(job["adapter_id"]) == weights


def test_an_adapter_that_a_cancel_was_to_keep_is_handed_out_as_it_was(studio: StudioServer) -> None:
    job_id, obstacle = submit(studio, max_steps=10**6)
    obstacle.write_text("a file where a folder is to be made")
    studio.wait_for_step(job_id, 3)
    studio.http.post(f"/api/training/jobs/{job_id}/cancel", json={"keep": "adapter"})
    job = studio.wait_for_state(job_id, "paused", "cancelled", "failed")
    assert job["state"] == "paused" and job["error"]["class"] == "cannot_save", job
    steps = len(studio.metrics(job_id))
    obstacle.unlink()
    studio.http.post(f"/api/training/jobs/{job_id}/resume")
    job = studio.wait_for_state(job_id, "cancelled", "failed")
    assert job["state"] == "cancelled" and job["metrics"]["adapter_step"] == steps == len(studio.metrics(job_id))
    assert studio.adapter_weights(job["adapter_id"])


def test_a_job_that_ended_is_trained_longer(studio: StudioServer) -> None:
    settings = {"scheduler": "constant", "max_steps": 6}
    first, _ = submit(studio, **settings)
    studio.wait_for_state(first, "succeeded")
    dataset = studio.job(first)["dataset_id"]
    second = studio.submit(
        model_id=TINY_ID, dataset_id=dataset, overrides=SETTINGS | settings | {"max_steps": 9}, resume_from=first
    )["id"]
    job = studio.wait_for_state(second, "succeeded", "failed")
    assert job["state"] == "succeeded" and job["resumed_from"] == f"{first}/step-00000006"
    assert sorted(studio.metrics(second)) == [7, 8, 9]
