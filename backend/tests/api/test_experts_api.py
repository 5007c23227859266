"""Experts through HTTP: what is said before a run is what the run trains, and it is exported and comes back."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families.small_models import make_small

from tests.api.test_exports_api import export, finished
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
MIXTURE = "tests/mixtral"
SHORT = {"rank": 4, "max_seq_length": 64, "max_steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Iterator[StudioServer]:
    folder = tmp_path_factory.mktemp("experts")
    make_small("mixtral", folder / "models" / MIXTURE, tiny_path)
    with start_server(folder / "home", folder / "models") as server:
        yield server


def _configured(studio: StudioServer, algorithm: str = "lora", **overrides: Any) -> dict[str, Any]:
    body = {"model_id": MIXTURE, "use_case": "chatbot", "algorithm": algorithm, "overrides": {**SHORT, **overrides}}
    answer = studio.http.post("/api/peft/configure", json=body)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def test_the_default_says_what_of_the_experts_is_trained_and_why(studio: StudioServer) -> None:
    said = _configured(studio)
    choice = said["parameters"]["target_experts"]
    assert (choice["value"], choice["source"], said["config"]["target_experts"]) == (True, "hardware", True)
    assert "dropout 0.05 is left out on stacked experts" in choice["reason"]
    # Two layers of four experts: 64 to 256 features, and 128 to 64.
    assert {"role": "expert", "modules": 4, "parameters": 2 * 4 * 4 * (64 + 256 + 128 + 64)} in said["trained"]
    left_out = _configured(studio, target_experts=False)
    assert "expert" not in {item["role"] for item in left_out["trained"]}


@pytest.mark.parametrize("algorithm", ["dora", "pissa"])
def test_a_method_that_cannot_adapt_them_says_so_or_is_refused(studio: StudioServer, algorithm: str) -> None:
    said = _configured(studio, algorithm)["parameters"]["target_experts"]
    assert said["value"] is False and "experts" in said["reason"]
    body = {"model_id": MIXTURE, "algorithm": algorithm, "overrides": {"target_experts": True}}
    dataset = studio.upload(messages_jsonl())
    for path, wanted in (
        ("/api/peft/configure", body),
        ("/api/peft/load-model", body),
        ("/api/training/jobs", body | {"dataset_id": dataset["id"]}),
    ):
        answer = studio.http.post(path, json=wanted)
        assert answer.status_code == 422 and "experts cannot be adapted" in answer.json()["detail"], answer.text
        assert answer.json()["errors"][0]["location"][-1] == "target_experts"


def test_a_run_trains_what_was_said_and_its_adapter_is_exported_and_answers(studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl())
    said = _configured(studio)
    job = studio.submit(model_id=MIXTURE, dataset_id=dataset["id"], use_case="chatbot", overrides=SHORT)
    done = studio.wait_for_state(job["id"], "succeeded")
    assert done["config"]["target_experts"] is True
    events = studio.http.get(f"/api/training/jobs/{job['id']}/events", params={"format": "json"}).json()["events"]
    (started,) = [event["data"] for event in events if event["kind"] == "started"]
    assert started["trainable_parameters"] == sum(item["parameters"] for item in said["trained"])
    assert any("left out on stacked experts" in words for words in started["warnings"])
    (built,) = [event["data"] for event in events if event["kind"] == "built"]
    assert (built["adapted_modules"]["gate_up_proj"], built["adapted_modules"]["down_proj"]) == (2, 2)
    assert built["dropouts"] == [0.0, 0.05]
    archive = studio.http.get(f"/api/adapters/{done['adapter_id']}/download").content
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        (name,) = [name for name in files.namelist() if name.endswith("adapter_config.json")]
        settings = json.loads(files.read(name))
    assert sorted(settings["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    back = studio.http.post("/api/adapters", files={"file": ("mine.zip", archive)}, data={"name": "back"})
    assert back.status_code == 201, back.text
    assert studio.adapter_weights(back.json()["id"]) == studio.adapter_weights(done["adapter_id"])
    exported = finished(studio, export(studio, done["adapter_id"])["id"])
    assert exported["state"] == "succeeded", exported["error"]
    loaded = studio.load(MIXTURE, overrides=SHORT, adapter_id=done["adapter_id"], wait_s=120)
    answers = [
        studio.generate(loaded["id"], "say 1", adapter, max_new_tokens=8, temperature=0.0)
        for adapter in (done["adapter_id"], back.json()["id"])
    ]
    assert answers[0]["completion_tokens"] >= 1 and answers[0]["text"] == answers[1]["text"]
