"""The methods as a client sees them: what is offered, what is an extra, and why others are refused."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from domain.peft.algorithms import NOT_OFFERED, Algorithm
from main import create_app

FIVE = {"lora", "qlora", "dora", "pissa", "rslora"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    yield TestClient(create_app(), base_url="http://127.0.0.1")


def test_the_five_are_listed_and_the_others_are_extras(client: TestClient) -> None:
    listed = client.get("/api/peft/algorithms").json()["algorithms"]
    assert {item["id"] for item in listed} == set(Algorithm)
    assert {item["id"] for item in listed if not item["extra"]} == FIVE
    (plus,) = [item for item in listed if item["id"] == "lora-plus"]
    (ratio,) = [item for item in plus["parameters"] if item["name"] == "lora_plus_ratio"]
    assert (ratio["default"], ratio["minimum"], ratio["maximum"]) == (16.0, 1, 256)


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_a_known_method_that_is_not_offered_is_refused_with_the_reason(client: TestClient, name: str) -> None:
    answer = client.post("/api/peft/configure", json={"algorithm": name})
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["location"][-1] == "algorithm" and NOT_OFFERED[name] in error["message"]


@pytest.mark.parametrize(
    ("algorithm", "overrides", "named"),
    [
        ("lora", {"loftq_iterations": 2}, "loftq_iterations"),
        ("lora", {"init_weights": "olora"}, "init_weights"),
        ("loftq", {"quantization": "none"}, "quantization"),
        ("lora-plus", {"lora_plus_ratio": None}, "lora_plus_ratio"),
        ("pissa", {"quantization": "int8"}, "quantization"),
    ],
)
def test_settings_without_effect_or_sense_are_refused_by_name(
    client: TestClient, algorithm: str, overrides: dict[str, object], named: str
) -> None:
    answer = client.post("/api/peft/configure", json={"algorithm": algorithm, "overrides": overrides})
    assert answer.status_code == 422
    assert named in {item["location"][-1] for item in answer.json()["errors"]}


def test_every_setting_of_an_extra_arrives_in_the_configuration(client: TestClient) -> None:
    for algorithm, overrides in (
        ("lora-plus", {"lora_plus_ratio": 8.0, "quantization": "nf4"}),
        ("qlora", {"lora_plus_ratio": 4.0}),
        ("loftq", {"loftq_iterations": 5}),
        ("olora", {"quantization": "nf4", "use_rslora": True}),
        ("pissa", {"quantization": "nf4"}),
    ):
        answer = client.post("/api/peft/configure", json={"algorithm": algorithm, "overrides": overrides})
        assert answer.status_code == 200, answer.text
        assert answer.json()["config"].items() >= overrides.items()
