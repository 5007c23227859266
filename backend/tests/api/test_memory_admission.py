"""Memory over HTTP: the verdict before a download, and the same estimate at the door of loads and jobs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from tests.support.server import CACHE, StudioServer, start_server
from tests.support.shapes import keep_shape
from tests.support.tiny_model import TINY_ID, copy_tiny_model

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the larger one of the two that fit
GPTQ_ID, DEEP_ID = "tests/in-gptq", "tests/deep"
HUGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """A server with the tiny model, one as if in GPTQ, and one of 405 thousand million parameters in one tensor."""
    root = tmp_path_factory.mktemp("models")
    copy_tiny_model(root / TINY_ID)
    huge = root / "tests" / "huge"
    huge.mkdir()
    (huge / "config.json").write_text(json.dumps(HUGE))
    keep_shape(CACHE, HUGE)
    save_file({"weight": numpy.zeros(1, numpy.float32)}, huge / "model.safetensors")
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    deep = {"num_hidden_layers": 48}  # hundreds of GB for 262,144 tokens at once
    for name, changed in ((DEEP_ID, deep), (GPTQ_ID, gptq)):
        copy_tiny_model(root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | changed))
        keep_shape(CACHE, config | changed)
    with start_server(tmp_path_factory.mktemp("home"), root) as server:
        yield server


def test_a_chat_that_does_not_fit_can_be_asked_again_later(studio: StudioServer) -> None:
    body = {"model": "tests/huge", "messages": [{"role": "user", "content": "a"}]}
    response = studio.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
    assert response.json()["error"]["code"] == "does_not_fit"


def _dataset(studio: StudioServer, folder: Path, rows: int) -> str:
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    file = folder / "rows.jsonl"
    file.write_text(f"{row}\n" * rows)
    with file.open("rb") as content:
        response = studio.http.post("/api/datasets", files={"file": ("rows.jsonl", content)})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def test_a_load_that_does_not_fit_is_refused_with_what_would(studio: StudioServer) -> None:
    response = studio.http.post("/api/peft/load-model", json={"model_id": "tests/huge"})
    assert response.status_code == 409
    problem = response.json()
    assert problem["type"].endswith("does-not-fit")
    assert problem["estimate_bytes"] == problem["estimate"]["total_bytes"] > problem["available_bytes"]
    changes = [item["change"] for item in problem["suggestions"]]
    assert changes[0].startswith("quantization=nf4")
    assert changes[-1] == f"the smaller model {EMBEDDED}"
    assert studio.http.get("/api/peft/loaded-models").json()["models"] == []
    assert not studio.engines()


def test_the_verdict_agrees_with_the_door(studio: StudioServer) -> None:
    found = studio.http.post("/api/models/compatibility", json={"model_id": "tests/huge"}).json()
    assert found["verdict"] == "does_not_fit"
    assert found["estimate"]["low_bytes"] <= found["estimate"]["total_bytes"] <= found["estimate"]["high_bytes"]
    assert found["suggestions"][-1]["change"] == f"the smaller model {EMBEDDED}"
    small = studio.http.post("/api/models/compatibility", json={"model_id": TINY_ID}).json()
    assert small["verdict"] == "fits" and small["suggestions"] == [] and small["blockers"] == []


def test_suggestions_hold_when_they_are_sent_back(studio: StudioServer) -> None:
    # All that would be fitted to the memory is named: a suggestion is about one setting, the others as they are.
    question = {
        "model_id": TINY_ID,
        "memory_bytes": 620 * 2**20,
        "batch_size": 8,
        "gradient_checkpointing": False,
        "precision": "fp32",
        "max_seq_length": 256,
        "rank": 64,
    }
    first = studio.http.post("/api/models/compatibility", json=question).json()
    assert first["verdict"] != "fits" and first["suggestions"]
    known = ("gradient_checkpointing", "max_seq_length", "rank")
    for item in first["suggestions"]:
        if len(item["overrides"]) == 1 and (name := next(iter(item["overrides"]))) in known:
            again = studio.http.post("/api/models/compatibility", json=question | item["overrides"]).json()
            assert (again["estimate"]["total_bytes"], again["verdict"]) == (item["estimate_bytes"], item["verdict"]), (
                name
            )


@pytest.mark.engine
def test_a_job_that_does_not_fit_is_refused_unless_it_is_forced(studio: StudioServer, tmp_path: Path) -> None:
    body: dict[str, Any] = {
        "model_id": DEEP_ID,
        "dataset_id": _dataset(studio, tmp_path, 1024),
        "overrides": {
            "batch_size": 1024,
            "max_seq_length": 256,
            "rank": 1024,
            "target_modules": "all-linear",
            "gradient_checkpointing": False,
            "packing": True,
        },
    }
    asked = {**body["overrides"], "model_id": DEEP_ID}
    asked.pop("packing")
    assert studio.http.post("/api/models/compatibility", json=asked).json()["verdict"] == "does_not_fit"
    response = studio.http.post("/api/training/jobs", json=body)
    assert response.status_code == 409
    problem = response.json()
    assert problem["type"].endswith("does-not-fit")
    assert problem["suggestions"][0]["overrides"] and problem["estimate"]["activations_bytes"] > 0
    assert studio.http.get("/api/training/jobs").json()["jobs"] == []
    forced = studio.http.post("/api/training/jobs", json=body | {"force": True})
    assert forced.status_code == 202
    job_id = forced.json()["id"]
    studio.http.post(f"/api/training/jobs/{job_id}/cancel")
    assert studio.job(job_id)["config"]["batch_size"] == 1024


def test_what_the_engine_cannot_train_is_refused_at_the_door_with_the_verdicts_reason(
    studio: StudioServer, tmp_path: Path
) -> None:
    blockers = studio.http.post("/api/models/compatibility", json={"model_id": GPTQ_ID}).json()["blockers"]
    assert len(blockers) == 1 and "gptq" in blockers[0]
    job = {"model_id": GPTQ_ID, "dataset_id": _dataset(studio, tmp_path, 4), "algorithm": "lora"}
    loaded = studio.http.get("/api/peft/loaded-models").json()
    for path, body in (("/api/peft/load-model", {"model_id": GPTQ_ID}), ("/api/training/jobs", job)):
        response = studio.http.post(path, json=body)
        assert response.status_code == 422, response.text
        assert response.json()["type"].endswith("model-rejected") and blockers[0] in response.json()["detail"]
    assert studio.http.get("/api/peft/loaded-models").json() == loaded
