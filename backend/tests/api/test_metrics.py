"""What `GET /metrics` counts is what happened."""

import signal

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, wait_until
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine


def samples(studio: StudioServer) -> dict[str, float]:
    response = studio.http.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "le")
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_requests_jobs_steps_and_deaths_are_counted(studio: StudioServer) -> None:
    before = samples(studio)
    assert before["peft_studio_jobs{state=running}"] == 0
    for _ in range(3):
        studio.http.get("/api/training/jobs/none")
    studio.http.get("/api/models/someone/something")
    dataset = studio.upload(messages_jsonl())
    settings = {"max_steps": 30, "max_seq_length": 64, "checkpoint_every_steps": 1}
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides=settings)
    studio.wait_for_step(job["id"], 5)
    assert samples(studio)["peft_studio_jobs{state=running}"] == 1
    studio.engine().send_signal(signal.SIGKILL)
    studio.events(job["id"])
    after = samples(studio)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    not_found = "method=GET,route=/api/training/jobs/{job_id},status=404"
    assert grown(f"peft_studio_http_request_seconds_count{{{not_found}}}") == 3
    assert after["peft_studio_jobs{state=succeeded}"] == 1 and after["peft_studio_jobs{state=running}"] == 0
    assert grown("peft_studio_job_queue_seconds_count{}") == 1
    steps = grown("peft_studio_training_step_seconds_count{algorithm=lora}")
    assert 30 <= steps <= 31  # at most the step under way is taken twice
    last = studio.job(job["id"])["metrics"]["last"]
    assert grown("peft_studio_training_tokens_total{algorithm=lora}") >= last["tokens"]
    assert grown("peft_studio_engine_starts_total{}") == 2
    assert grown("peft_studio_engine_deaths_total{how=signal 9}") == 1
    assert grown("peft_studio_job_interruptions_total{error_class=engine_killed}") == 1
    memory = after[f"peft_studio_model_memory_bytes{{device=cpu,model={TINY_ID}}}"]
    (model,) = studio.http.get("/api/peft/loaded-models").json()["models"]
    assert memory == model["memory"]["measured_bytes"] > 50 * 2**20
    assert not any("someone" in name or job["id"] in name for name in after)  # no label grows without bound

    studio.http.delete(f"/api/peft/loaded-models/{model['id']}")
    wait_until(lambda: not any(name.startswith("peft_studio_model_memory") for name in samples(studio)))
