"""Training on every kind of dataset, through the door users use."""

import json
from typing import Any

import pytest

from tests.support.rows import judged_jsonl, messages_jsonl, preference_jsonl
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
SHORT = {"max_steps": 2, "max_seq_length": 64, "rank": 4, "target_modules": ["q_proj"]}


def run(studio: StudioServer, dataset: dict[str, Any], **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train to the end; return the job and what it said at its start."""
    values = {"model_id": TINY_ID, "dataset_id": dataset["id"], "overrides": SHORT} | body
    job = studio.submit(**values)
    studio.events(job["id"])
    events = studio.http.get(f"/api/training/jobs/{job['id']}/events?format=json").json()["events"]
    started = [event["data"] for event in events if event["kind"] == "started"]
    return studio.job(job["id"]), started[0] if started else {}


def test_plain_text_is_trained_on_whole_and_long_texts_are_cut_into_rows(studio: StudioServer) -> None:
    dataset = studio.upload("the quick brown fox " * 200 + "\nshort\n", "a.txt")
    job, started = run(studio, dataset)
    assert (job["state"], job["config"]["train_on"]) == ("succeeded", "all")
    assert started["rows"] > 10 and started["truncated_rows"] == 0
    body = {"model_id": TINY_ID, "dataset_id": dataset["id"], "overrides": {"train_on": "assistant"}}
    refused = studio.http.post("/api/training/jobs", json=body)
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/dataset-not-trainable")


def test_a_job_that_would_learn_nothing_ends_before_its_base_is_loaded_and_names_the_rows(studio: StudioServer) -> None:
    rows = [{"prompt": f"{number} " + "x " * 400, "completion": "y"} for number in range(3)]
    dataset = studio.upload("\n".join(json.dumps(row) for row in rows))
    loaded = len(studio.http.get("/api/peft/loaded-models").json()["models"])
    job, started = run(studio, dataset)
    assert (job["state"], job["error"]["class"], job["attempts"]) == ("failed", "dataset_not_trainable", 1), job
    assert "the answer begins beyond it (rows 1, 2, 3)" in job["error"]["message"] and started == {}
    assert len(studio.http.get("/api/peft/loaded-models").json()["models"]) == loaded
    # In doubt and yet to be learned from: one row's answer is within reach.
    rows.append({"prompt": "x" * 50, "completion": "y"})
    job, started = run(studio, studio.upload("\n".join(json.dumps(row) for row in rows)))
    assert (job["state"], started["rows"], started["skipped_rows"]) == ("succeeded", 1, 3), job


def _validation(studio: StudioServer, job_id: str, **query: int) -> dict[str, Any]:
    answer = studio.http.get(f"/api/training/jobs/{job_id}/validation", params=query)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_what_a_job_is_evaluated_on_is_its_validation_dataset_or_nothing(studio: StudioServer) -> None:
    dataset, other = studio.upload(messages_jsonl(3)), studio.upload(messages_jsonl(5))
    body = {"model_id": TINY_ID, "dataset_id": dataset["id"], "overrides": SHORT}
    with_dataset = studio.submit(**body, validation_dataset_id=other["id"])["id"]
    without = studio.submit(**body)["id"]
    found = _validation(studio, with_dataset, offset=3)
    assert (found["dataset_id"], found["total"], [row["row"] for row in found["rows"]]) == (other["id"], 5, [3, 4])
    assert (_validation(studio, without)["total"], _validation(studio, without)["rows"]) == (0, [])
    for job_id in (with_dataset, without):
        studio.http.post(f"/api/training/jobs/{job_id}/cancel")
        studio.wait_for_state(job_id, "cancelled", "succeeded")
    assert studio.http.get("/api/training/jobs/job_none/validation").status_code == 404


def test_repeated_rows_are_not_validated_on_after_being_trained_on(studio: StudioServer) -> None:
    lines = messages_jsonl(12).splitlines()
    dataset = studio.upload("\n".join(lines * 4))
    job, started = run(studio, dataset, validation_fraction=0.25)
    assert job["state"] == "succeeded"
    assert (started["rows"], started["validation_rows"]) == (36, 12)
    held = _validation(studio, job["id"], limit=100)
    positions = [row["row"] for row in held["rows"]]
    assert (held["dataset_id"], held["total"], len(positions)) == (dataset["id"], 12, 12)
    assert sorted(position + 12 * turn for position in positions[:3] for turn in range(4)) == positions
    said = [[{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]] for row in held["rows"]]
    assert said == [json.loads(lines[position % 12])["messages"] for position in positions]
    page = _validation(studio, job["id"], offset=5, limit=2)
    assert page["rows"] == held["rows"][5:7]
    same = studio.upload("\n".join(lines[:1] * 8))
    body = {"model_id": TINY_ID, "dataset_id": same["id"], "overrides": SHORT, "validation_fraction": 0.25}
    refused = studio.http.post("/api/training/jobs", json=body)
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/setting-rejected")
    assert "all rows are the same" in refused.json()["detail"]


def test_answers_of_weight_0_are_not_trained_on(studio: StudioServer) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a" * 20},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b" * 10},
    ]
    _, both = run(studio, studio.upload(json.dumps({"messages": turns})))
    turns[1]["weight"] = 0
    _, last = run(studio, studio.upload(json.dumps({"messages": turns})))
    assert 0 < last["trained_tokens"] < both["trained_tokens"]


def test_turns_that_the_model_will_not_take_fail_the_job_with_their_row(studio: StudioServer) -> None:
    calls = [{"name": "f", "arguments": {}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    job, _ = run(studio, studio.upload(json.dumps({"messages": turns})))
    assert (job["state"], job["error"]["class"]) == ("failed", "bad_data")
    assert job["error"]["message"] == "row 1: the model's chat template leaves tool calls out"


@pytest.mark.parametrize(
    ("content", "settings", "objective"),
    [
        (preference_jsonl(), {}, "dpo"),
        (preference_jsonl(), {"objective": "orpo", "preference_beta": 0.3, "packing": True}, "orpo"),
        (judged_jsonl(), {"batch_size": 4}, "kto"),
    ],
)
def test_preferences_are_learned_and_the_adapter_answers(
    studio: StudioServer, content: str, settings: dict[str, Any], objective: str
) -> None:
    dataset = studio.upload(content)
    overrides = SHORT | {"max_steps": 6, "learning_rate": 1e-2} | settings
    job, started = run(studio, dataset, overrides=overrides, validation_fraction=0.2)
    assert job["state"] == "succeeded", job["error"]
    assert (job["config"]["objective"], job["config"]["dropout"]) == (objective, 0.0)
    assert started["rows"] + started["validation_rows"] == 16
    rows = studio.http.get(f"/api/training/jobs/{job['id']}/metrics").json()["metrics"]
    assert [row["preference"]["accuracy"] >= 0 for row in rows] == [True] * 6
    assert rows[-1]["preference"]["margin"] > rows[0]["preference"]["margin"]
    assert rows[-1]["eval_loss"] < job["metrics"]["initial_eval_loss"]
    loaded = studio.load(TINY_ID)
    assert "text" in studio.generate(loaded["id"], "count from 1", job["adapter_id"])


def test_a_preference_is_not_learned_from_answers(studio: StudioServer) -> None:
    body = {
        "model_id": TINY_ID,
        "dataset_id": studio.upload(messages_jsonl(4))["id"],
        "overrides": {"objective": "dpo"},
    }
    refused = studio.http.post("/api/training/jobs", json=body)
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/dataset-not-trainable")
    assert "objective='dpo' learns from preferences" in refused.json()["detail"]


def test_the_weight_of_a_preference_takes_effect(studio: StudioServer) -> None:
    """At the first step adapter and base are the same, and the gradient is β times one that no setting changes."""
    dataset = studio.upload(preference_jsonl(8))
    norms = []
    for beta in (0.1, 0.3):
        overrides = SHORT | {"preference_beta": beta, "batch_size": 8, "max_grad_norm": 1e6}
        job, _ = run(studio, dataset, overrides=overrides)
        assert (job["state"], job["config"]["preference_beta"]) == ("succeeded", beta), job["error"]
        norms.append(studio.http.get(f"/api/training/jobs/{job['id']}/metrics").json()["metrics"][0]["grad_norm"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-4)
