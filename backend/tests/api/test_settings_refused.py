"""A setting that cannot take effect is refused over HTTP, by name and with the reason, wherever it is sent."""

from typing import Any

import pytest

from api.compatibility import CompatibilityRequest
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.config import PeftConfig
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID

ON_A_CPU = {"precision": "fp16", "optimizer": "adamw_8bit", "quantization": "int8"}
# The tiny model knows 256 positions, and its layers are llama's.
OF_THE_MODEL: dict[str, Any] = {"max_seq_length": 257, "target_modules": ["q_proj", "query_key_value"]}
OF_THE_DATA = {"eval_every_steps": 2}  # no validation rows are named


def _contradictions() -> list[tuple[Algorithm, str, Any]]:
    """Every value of every fixed setting but the right one, and every refused value."""
    found: list[tuple[Algorithm, str, Any]] = []
    for algorithm, spec in SPECS.items():
        for name, right in spec.fixed.items():
            schema = PeftConfig.model_json_schema()["properties"][name]
            values = schema.get("enum", [True, False])
            found += [(algorithm, name, value) for value in values if value != right]
        found += [(algorithm, name, value) for name, refused in spec.refused.items() for value in refused]
    return list(dict.fromkeys(found))


def _refusal(studio: StudioServer, path: str, name: str, body: dict[str, Any]) -> str:
    """Send it; return the first message about the setting, which names it as every one does."""
    response = studio.http.post(path, json=body)
    assert response.status_code == 422, response.text
    problem = response.json()
    messages = [str(item["message"]) for item in problem["errors"] if name in item["location"]]
    assert messages and all(message.startswith(f"{name}: ") for message in messages)
    return messages[0]


def _refusal_by_every_route(studio: StudioServer, name: str, body: dict[str, Any]) -> str:
    """Send it wherever settings are taken; return the message, which is the same everywhere."""
    dataset = studio.upload(messages_jsonl())
    messages = {
        _refusal(studio, "/api/peft/configure", name, body),
        _refusal(studio, "/api/peft/load-model", name, body),
        _refusal(studio, "/api/training/jobs", name, body | {"dataset_id": dataset["id"]}),
    }
    (message,) = messages
    return message


@pytest.mark.parametrize(("algorithm", "name", "value"), _contradictions())
def test_what_contradicts_the_algorithm_is_refused(
    studio: StudioServer, algorithm: Algorithm, name: str, value: Any
) -> None:
    body = {"model_id": TINY_ID, "algorithm": algorithm.value, "overrides": {name: value}}
    _refusal(studio, "/api/peft/configure", name, body)


@pytest.mark.parametrize(("name", "value"), [*ON_A_CPU.items(), *OF_THE_MODEL.items()])
def test_what_this_machine_or_model_cannot_do_is_refused_by_every_route(
    studio: StudioServer, name: str, value: Any
) -> None:
    message = _refusal_by_every_route(studio, name, {"model_id": TINY_ID, "overrides": {name: value}})
    if name in CompatibilityRequest.model_fields:
        assert _refusal(studio, "/api/models/compatibility", name, {"model_id": TINY_ID, name: value}) == message


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("algorithm", [algorithm for algorithm in Algorithm if algorithm is not Algorithm.LOFTQ])
def test_loftqs_iterations_are_refused_with_every_other_method(
    studio: StudioServer, algorithm: Algorithm, iterations: int
) -> None:
    body = {"model_id": TINY_ID, "algorithm": algorithm.value, "overrides": {"loftq_iterations": iterations}}
    assert "without effect but with the algorithm 'loftq'" in _refusal_by_every_route(studio, "loftq_iterations", body)


@pytest.mark.parametrize(
    ("algorithm", "name", "value", "reason"),
    [
        (Algorithm.LORA_PLUS, "lora_plus_ratio", None, "the ratio of the two rates is the method"),
        (Algorithm.LOFTQ, "loftq_iterations", None, "alternates at least once"),
        (Algorithm.LOFTQ, "quantization", "none", "nothing to correct in weights that are not rounded"),
        (Algorithm.LORA, "init_weights", "olora", "choose the algorithm 'olora'"),
        (Algorithm.QLORA, "init_weights", "loftq", "choose the algorithm 'loftq'"),
        (Algorithm.LORA_PLUS, "init_weights", "pissa", "choose the algorithm 'pissa'"),
    ],
)
def test_what_an_extra_method_is_cannot_be_taken_from_it_or_had_without_it(
    studio: StudioServer, algorithm: Algorithm, name: str, value: Any, reason: str
) -> None:
    body = {"model_id": TINY_ID, "algorithm": algorithm.value, "overrides": {name: value}}
    assert reason in _refusal_by_every_route(studio, name, body)


@pytest.mark.parametrize(
    "overrides",
    [OF_THE_DATA, OF_THE_DATA | {"early_stopping_patience": 1}, {"early_stopping_patience": 1}],
)
def test_an_evaluation_without_rows_for_it_is_refused(studio: StudioServer, overrides: dict[str, int]) -> None:
    dataset = studio.upload(messages_jsonl())
    body = {"model_id": TINY_ID, "dataset_id": dataset["id"], "overrides": overrides}
    _refusal(studio, "/api/training/jobs", [*overrides][-1], body)


def test_a_length_in_epochs_beside_one_in_steps_is_refused(studio: StudioServer) -> None:
    body = {"model_id": TINY_ID, "overrides": {"epochs": 1.0, "max_steps": 5}}
    assert "max_steps" in _refusal(studio, "/api/peft/configure", "epochs", body)


@pytest.mark.engine
def test_what_was_set_for_a_loaded_model_holds_for_its_jobs(studio: StudioServer) -> None:
    loaded = studio.load(TINY_ID, algorithm="rslora", overrides={"rank": 5, "epochs": 1.0, "learning_rate": 1e-3})
    dataset = studio.upload(messages_jsonl())
    job = studio.submit(
        loaded_model_id=loaded["id"],
        dataset_id=dataset["id"],
        algorithm="rslora",
        overrides={"max_steps": 2, "learning_rate": 2e-3},
    )
    config = job["config"]
    assert (config["rank"], config["learning_rate"], config["max_steps"]) == (5, 2e-3, 2)
    studio.wait_for_state(job["id"], "succeeded")


@pytest.mark.engine
def test_what_one_job_was_set_to_says_nothing_about_the_next(studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl())
    own = {"rank": 3, "seed": 7, "max_steps": 2, "precision": "bf16"}
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], algorithm="dora", overrides=own)
    assert studio.wait_for_state(job["id"], "succeeded", "failed")["error"] is None
    models = studio.http.get("/api/peft/loaded-models").json()["models"]
    (loaded,) = [model for model in models if model["config"]["rank"] == 3]
    following = studio.submit(
        loaded_model_id=loaded["id"], dataset_id=dataset["id"], algorithm="dora", overrides={"max_steps": 1}
    )
    assert (following["config"]["rank"], following["config"]["seed"]) == (16, 42)
    studio.wait_for_state(following["id"], "succeeded")


def test_more_gpus_than_this_machine_has_are_refused(studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl())
    body = {"model_id": TINY_ID, "dataset_id": dataset["id"], "gpus": 2}
    assert _refusal(studio, "/api/training/jobs", "gpus", body) == "gpus: this machine has 0 that can train"
