"""Analysis over HTTP: what a job would learn, worked out once, and a job that would learn nothing refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_templates import trl_templates
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, wait_until
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine


def analyze(studio: StudioServer, dataset_id: str, **body: Any) -> dict[str, Any]:
    values = {"model_id": TINY_ID, "max_seq_length": 64} | body
    response = studio.http.post(f"/api/datasets/{dataset_id}/analyze", json=values)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_an_analysis_says_what_the_job_then_does(studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl(20) + messages_jsonl(2))
    overrides = {"batch_size": 3, "gradient_accumulation": 2, "epochs": 2.0, "max_seq_length": 64, "rank": 4}
    found = analyze(studio, dataset["id"], overrides=overrides)
    assert (found["rows"], found["duplicate_rows"], found["warnings"]) == (22, 2, [])
    assert found["config"]["batch_size"] == 3 and found["duration"] is None
    trained = [piece["text"] for piece in found["example"]["pieces"] if piece["trained"]]
    assert trained == ["0 0 number 0<|end|>"]
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides=overrides)
    studio.events(job["id"])
    events = studio.http.get(f"/api/training/jobs/{job['id']}/events?format=json").json()["events"]
    (started,) = [event["data"] for event in events if event["kind"] == "started"]
    assert (started["total_steps"], started["trained_tokens"], started["rows"]) == (
        found["epoch"]["total_steps"],
        found["epoch"]["trained_tokens"],
        found["epoch"]["rows"],
    )
    steps = studio.http.get(f"/api/training/jobs/{job['id']}/metrics").json()["metrics"]
    assert steps[-1]["tokens"] == found["epoch"]["total_tokens"]
    again = analyze(studio, dataset["id"], overrides=overrides)
    assert again["duration"]["measured_by_job_id"] == job["id"]
    assert again["duration"]["expected_s"] > 0
    assert again | {"duration": None} == found


def test_an_analysis_is_made_once_and_goes_with_its_dataset(studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl(3))
    engines = studio.engines()  # that hold a base
    url, body = f"/api/datasets/{dataset['id']}/analyze", {"model_id": TINY_ID, "max_seq_length": 64}
    waiting = studio.http.post(url, json=body | {"wait_s": 0})
    assert (waiting.status_code, waiting.json()["state"]) == (202, "running")
    folder = studio.home / "datasets" / dataset["id"]
    wait_until(lambda: list(folder.glob("analysis-*.json")))
    (kept,) = folder.glob("analysis-*.json")
    written = kept.stat().st_mtime_ns
    assert studio.http.post(url, json=body | {"wait_s": 0}).status_code == 200
    assert analyze(studio, dataset["id"], overrides={"learning_rate": 0.1})["rows"] == 3
    assert [path.stat().st_mtime_ns for path in folder.glob("analysis-*.json")] == [written]
    assert studio.engines() == engines
    assert studio.http.delete(f"/api/datasets/{dataset['id']}").status_code == 204
    assert not folder.exists()


def test_thinking_that_the_template_leaves_out_is_said(studio: StudioServer) -> None:
    root = Path(studio._environment["PEFT_STUDIO_MODEL_DIRS"])
    folder = root / "tests" / "thinker"
    folder.mkdir(exist_ok=True)
    for file in (root / TINY_ID).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(trl_templates(with_marks=False)["qwen3"])
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>hm</think>a"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>hm</think>b"},
    ]
    dataset = studio.upload("\n".join(json.dumps({"messages": rows}) for rows in (turns[2:], turns)))
    found = analyze(studio, dataset["id"], model_id="tests/thinker", max_seq_length=256)
    assert found["findings"]["earlier_thinking_left_out"] == {"rows": 1, "examples": [1]}
    assert found["findings"]["last_thinking_left_out"] == {"rows": 0, "examples": []}
    assert "1 of 2 rows have thinking in an earlier answer that the chat template leaves out" in found["warnings"]
    kept = analyze(studio, dataset["id"], max_seq_length=256)
    assert kept["findings"]["earlier_thinking_left_out"]["rows"] == 0
    assert not any("thinking" in warning for warning in kept["warnings"])


def test_a_job_that_would_learn_nothing_is_refused_once_that_is_known(studio: StudioServer) -> None:
    dataset = studio.upload(json.dumps({"prompt": "x " * 400, "completion": "y"}))
    found = analyze(studio, dataset["id"])
    assert found["findings"]["answer_lost"] == {"rows": 1, "examples": [0]}
    assert found["warnings"][0] == "nothing would be learned: a job is refused"
    assert found["example"] is None
    body = {"model_id": TINY_ID, "dataset_id": dataset["id"], "overrides": {"max_seq_length": 64}}
    refused = studio.http.post("/api/training/jobs", json=body)
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/dataset-not-trainable")
    assert "the answer begins beyond it (rows 1)" in refused.json()["detail"]
    shorter = body | {"overrides": {"max_seq_length": 32}}
    assert studio.http.post("/api/training/jobs", json=shorter).status_code == 422
    good = studio.upload(messages_jsonl(3))
    validated = body | {"dataset_id": good["id"], "validation_dataset_id": dataset["id"]}
    assert studio.http.post("/api/training/jobs", json=validated).status_code == 422
    body["overrides"] = {"max_seq_length": 256, "max_steps": 1}
    assert studio.http.post("/api/training/jobs", json=body).status_code == 202


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model_id": "nobody/nothing"}, 503, "hub-unavailable"),
        ({"max_seq_length": 4096}, 422, "setting-rejected"),
        ({"max_seq_length": 64, "overrides": {"max_seq_length": 32}}, 422, "invalid-request"),
        ({"overrides": {"train_on": "everything"}}, 422, "invalid-request"),
        ({"rows": 5}, 422, "invalid-request"),
    ],
)
def test_what_cannot_be_analysed_is_refused(studio: StudioServer, body: dict[str, Any], status: int, kind: str) -> None:
    dataset = studio.upload(messages_jsonl(3))
    response = studio.http.post(f"/api/datasets/{dataset['id']}/analyze", json={"model_id": TINY_ID} | body)
    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{kind}")


def test_text_and_preferences(studio: StudioServer) -> None:
    dataset = studio.upload("the quick brown fox " * 100, "a.txt")
    found = analyze(studio, dataset["id"])
    assert found["config"]["train_on"] == "all" and found["findings"]["split"]["rows"] == 1
    assert found["epoch"]["rows"] > 3
    preferences = studio.upload('{"prompt": "q", "chosen": "good one", "rejected": "bad"}')
    found = analyze(studio, preferences["id"])
    assert found["config"]["objective"] == "dpo" and found["epoch"]["rows"] == 1 and found["rows"] == 1
    for example, answer in (("example", "good one"), ("worse_example", "bad")):
        assert answer in "".join(piece["text"] for piece in found[example]["pieces"] if piece["trained"])
        assert "q" in "".join(piece["text"] for piece in found[example]["pieces"] if not piece["trained"])
    assert sum(bin_["rows"] for bin_ in found["histogram"]) == 2  # each answer is a sequence of its own
    response = studio.http.post("/api/datasets/ds_none/analyze", json={"model_id": TINY_ID})
    assert response.status_code == 404


def test_greetings_and_later_system_turns_train_what_is_counted_by_hand(studio: StudioServer) -> None:
    greeting = [("assistant", "JQ"), ("user", "hm"), ("assistant", "KXQ")]
    instructed = [("user", "hm"), ("assistant", "QJ"), ("system", "be"), ("user", "hm"), ("assistant", "Z")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in row]} for row in (greeting, instructed)
    ]
    dataset = studio.upload("\n".join(json.dumps(row) for row in rows))
    overrides = {"max_seq_length": 64, "max_steps": 1, "batch_size": 2, "rank": 4}
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides=overrides)
    studio.events(job["id"])
    events = studio.http.get(f"/api/training/jobs/{job['id']}/events?format=json").json()["events"]
    (started,) = [event["data"] for event in events if event["kind"] == "started"]
    # A token a letter, and an end mark for each of the four answers.
    assert (started["rows"], started["trained_tokens"]) == (2, len("JQ" + "KXQ" + "QJ" + "Z") + 4)
