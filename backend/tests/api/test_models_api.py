import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api import models, problems
from api.model_schemas import ConfigResponse
from domain.models.records import Fit
from domain.peft.algorithms import Algorithm
from services.hardware_service import get_machine
from services.model_registry_service import FitOf, get_model_registry_service
from services.models.fit import fit_of
from tests.support.hub_double import RATE_LIMITED, HubDouble, ManualClock, quiet_environment, safetensors_bytes
from tests.support.registries import make_registry
from tests.support.shapes import KnownShapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors_bytes({"w": ("BF16", (4,))})}
SUMMARY = {
    *("model_id", "author", "downloads", "likes", "task", "library", "tags", "license", "gated", "parameters"),
    *("size_bytes", "architecture", "created_at", "modified_at", "local", "fit"),
}
CONFIGS = Path(__file__).resolve().parents[4] / "shared" / "data" / "configs"


@dataclass
class Bench:
    hub: HubDouble
    folder: Path

    def client(self, fit_of: FitOf | None = None) -> TestClient:
        registry = make_registry(self.hub, self.folder, ManualClock(), fit_of=fit_of)
        app = FastAPI()
        problems.install(app)
        app.include_router(models.router)
        app.dependency_overrides[get_model_registry_service] = lambda: registry
        return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    quiet_environment(monkeypatch, tmp_path)
    with HubDouble() as hub:
        yield Bench(hub, tmp_path)


def test_a_search_answers_in_the_contracts_shape(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, pipeline_tag="text-generation", tags=["license:mit"], downloads=7)
    client = bench.client()
    body = client.post("/api/models/search", json={"query": "m"}).json()

    assert set(body) == {"models", "next_cursor", "source", "fetched_at", "stale"}
    assert (body["next_cursor"], body["source"], body["stale"]) == (None, "hub", False)
    assert body["fetched_at"].endswith("Z")
    (model,) = body["models"]
    assert set(model) == SUMMARY
    assert (model["downloads"], model["license"], model["tags"]) == (7, "mit", ["license:mit"])
    assert model["parameters"] is model["size_bytes"] is model["library"] is model["fit"] is None
    assert client.post("/api/models/search", json={"query": "m"}).json()["source"] == "cache"


def test_pages_are_followed_by_their_cursor(bench: Bench) -> None:
    for number in range(3):
        bench.hub.add_model(f"me/m{number}", {}, downloads=number)
    client = bench.client()
    first = client.post("/api/models/search", json={"task": None, "limit": 2}).json()
    second = client.post("/api/models/search", json={"task": None, "limit": 2, "cursor": first["next_cursor"]}).json()

    assert [model["model_id"] for model in first["models"] + second["models"]] == ["me/m2", "me/m1", "me/m0"]
    assert second["next_cursor"] is None


@pytest.mark.parametrize(
    "body",
    [
        {"unknown": 1},
        {"limit": "20"},
        {"limit": 0},
        {"limit": 101},
        {"limit": True},
        {"limit": 1.5},
        {"gated": "yes"},
        {"gated": 1},
        {"query": "x" * 201},
        {"query": 3},
        {"tags": "en"},
        {"tags": ["a b"]},
        {"tags": ["x"] * 21},
        {"sort": "size"},
        {"algorithm": "magic"},
        {"min_parameters": -1},
        {"max_parameters": 10**16},
        {"cursor": "x" * 2001},
        {"cursor": "http://elsewhere/"},
        {"only_fitting": True},
        [],
    ],
)
def test_a_search_that_is_not_one_is_refused_before_the_hub_is_asked(bench: Bench, body: Any) -> None:
    response = bench.client().post("/api/models/search", json=body)

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert bench.hub.requests.total() == 0


def test_details_answer_in_the_contracts_shape(bench: Bench) -> None:
    commit = bench.hub.add_model(
        "me/m",
        FILES,
        safetensors={"parameters": {"BF16": 4}, "total": 4},
        cardData={"base_model": "me/base", "language": ["en", "fr"]},
    )
    body = bench.client().get("/api/models/me/m", params={"revision": commit}).json()

    assert set(body) == SUMMARY | {
        *("sha", "revision", "files", "safetensors", "config", "chat_template", "base_model", "languages"),
        *("requires_remote_code", "source", "fetched_at", "stale"),
    }
    assert (body["sha"], body["revision"], body["fit"]) == (commit, commit, None)
    assert body["safetensors"] == {"parameters_by_dtype": {"BF16": 4}}
    assert body["files"][0] == {"path": "config.json", "size_bytes": len(FILES["config.json"])}
    assert body["config"] == {
        "model_type": "llama",
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "tied_embeddings": True,
        "experts": None,
    }
    assert (body["base_model"], body["languages"], body["chat_template"]) == ("me/base", ["en", "fr"], False)


def test_details_carry_a_fit_for_every_algorithm(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    client = bench.client(lambda config, summary, algorithm: Fit("fits", 5) if algorithm == "lora" else None)
    fit = client.get("/api/models/me/m").json()["fit"]

    assert fit["lora"] == {"verdict": "fits", "estimate_bytes": 5}
    assert fit["qlora"] is None
    assert set(fit) == set(Algorithm)


@pytest.mark.parametrize(
    ("path", "status", "slug"),
    [
        ("absent", 404, "model-not-found"),
        ("me/absent", 404, "model-not-found"),
        ("me/m?revision=absent", 404, "model-not-found"),
        ("me/m?revision=../x", 422, "model-rejected"),
        ("me/m?revision=", 422, "invalid-request"),
        ("a/b/c", 422, "model-rejected"),
        ("a--b", 422, "model-rejected"),
        ("a%2F..%2F..%2Fapi", 422, "model-rejected"),
        ("popular/nonsense", 404, "task-not-found"),
        ("popular/text-generation?limit=101", 422, "invalid-request"),
    ],
)
def test_what_cannot_be_answered_is_a_problem(bench: Bench, path: str, status: int, slug: str) -> None:
    bench.hub.add_model("me/m", FILES)
    response = bench.client().get(f"/api/models/{path}")

    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{slug}")


def test_an_unknown_task_lists_the_tasks(bench: Bench) -> None:
    assert "text-generation" in bench.client().get("/api/models/popular/nonsense").json()["tasks"]


def test_popular_has_the_shape_of_a_search(bench: Bench) -> None:
    bench.hub.add_model("me/m", {}, pipeline_tag="fill-mask")
    body = bench.client().get("/api/models/popular/fill-mask", params={"limit": 1}).json()
    assert [model["model_id"] for model in body["models"]] == ["me/m"]


def test_a_hub_that_asks_for_a_pause_is_a_503_that_says_how_long(bench: Bench) -> None:
    bench.hub.fail("info", status=429, headers=RATE_LIMITED)
    response = bench.client().get("/api/models/me/m")

    assert (response.status_code, response.headers["retry-after"]) == (503, "55")
    assert response.json()["retry_after_s"] == 55


def test_a_search_that_the_hub_puts_off_is_a_503_that_says_how_long(bench: Bench) -> None:
    bench.hub.fail("list", status=429, headers=RATE_LIMITED)
    response = bench.client().post("/api/models/search", json={})
    assert (response.status_code, response.headers["retry-after"]) == (503, "55")


def test_a_hub_that_says_nothing_is_a_503_with_a_time_all_the_same(bench: Bench) -> None:
    bench.hub.fail("info", status=500, times=9)
    response = bench.client().get("/api/models/me/m")
    assert (response.status_code, response.headers["retry-after"]) == (503, "30")


def test_local_models_have_a_path(bench: Bench) -> None:
    folder = bench.folder / "models" / "me" / "m"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    body = bench.client().get("/api/models/local").json()

    (model,) = body["models"]
    assert set(model) == SUMMARY | {"path", "revision"}
    assert (model["path"], model["local"], model["parameters"], model["revision"]) == (str(folder), True, 4, None)


def test_the_cache_is_emptied(bench: Bench) -> None:
    client = bench.client()
    client.post("/api/models/search", json={})
    response = client.delete("/api/models/cache")

    assert (response.status_code, response.content) == (204, b"")
    assert client.post("/api/models/search", json={}).json()["source"] == "hub"


def test_every_response_field_is_always_there(bench: Bench) -> None:
    schemas = bench.client().get("/openapi.json").json()["components"]["schemas"]
    for name, schema in schemas.items():
        if name.endswith("Response"):
            assert set(schema["required"]) == set(schema["properties"]), name


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="the collected configs are not here")
def test_every_collected_config_has_the_dimensions_it_states() -> None:
    for path in sorted(CONFIGS.glob("*/config.json")):
        raw = json.loads(path.read_text())
        config = ConfigResponse.of(raw)
        assert config.model_type == raw.get("model_type")
        assert None not in (config.hidden_size, config.layers), path.parent.name
        # Some leave the heads to their class's defaults, or state them for their vision tower only.
        text_part = raw | raw.get("text_config", {})
        stated = any(name in text_part for name in ("num_attention_heads", "n_head", "n_heads"))
        assert (config.heads is not None) == stated, path.parent.name


@pytest.mark.parametrize("value", ["64", True, 0, -1, 1.5, None, [64]])
def test_a_dimension_that_is_not_a_number_is_null(value: Any) -> None:
    assert ConfigResponse.of({"hidden_size": value}).hidden_size is None


def test_one_odd_model_leaves_lists_and_details_as_they_are(bench: Bench) -> None:
    odd = FILES | {"config.json": json.dumps(CONFIG | {"max_position_embeddings": 4}).encode()}
    said: dict[str, Any] = {"pipeline_tag": "text-generation", "safetensors": {"parameters": {"BF16": 4}, "total": 4}}
    for model_id, files in (("me/odd", odd), ("me/plain", FILES)):
        bench.hub.add_model(model_id, files, **said)
        folder = bench.folder / "models" / f"here-{model_id.partition('/')[2]}"
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    client = bench.client(partial(fit_of, get_machine(), KnownShapes()))
    for response in (
        client.post("/api/models/search", json={}),
        client.get("/api/models/popular/text-generation"),
        client.get("/api/models/local"),
    ):
        assert response.status_code == 200, response.text
        judged = {model["model_id"].rpartition("/")[2]: model["fit"] for model in response.json()["models"]}
        assert {name.removeprefix("here-"): fit and fit["verdict"] for name, fit in judged.items()} == {
            "odd": None,
            "plain": "fits",
        }
    details = client.get("/api/models/me/odd")
    assert details.status_code == 200
    assert details.json()["fit"] is None
