"""What the real Hub once answered, served again by the double and taken through the registry to the response."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api import models, problems
from services.hardware_service import get_machine
from services.model_registry_service import get_model_registry_service
from services.models.fit import fit_of
from tests.support.hub_double import HubDouble, ManualClock
from tests.support.registries import make_registry
from tests.support.shapes import KnownShapes

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "data" / "hub_api" / "vcr"
NO_DATE = "2022-03-02T23:29:04.000Z"  # what the Hub says of repositories older than its dates
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the recorded responses are not here")


@dataclass(frozen=True)
class Recorded:
    """One answer: the URL's path and query, and what came back."""

    name: str
    url: str
    status: int
    headers: dict[str, str]
    body: bytes


def recorded() -> list[Recorded]:
    found = []
    for meta_path in sorted(FOLDER.glob("models__*.meta.json")) if FOLDER.is_dir() else []:
        meta = json.loads(meta_path.read_text())
        body = (FOLDER / meta["body_file"]).read_bytes()
        name = meta_path.name.removesuffix(".meta.json")
        found.append(Recorded(name, meta["request"]["url"], meta["status"], meta["response_headers"], body))
    return found


SINGLE = [item for item in recorded() if item.status == 200 and urlsplit(item.url).path != "/api/models"]
LISTS = [item for item in recorded() if item.status == 200 and urlsplit(item.url).path == "/api/models"]
REDIRECTS = [item for item in recorded() if item.status == 307]
REFUSALS = [item for item in recorded() if item.status == 401]


@pytest.fixture
def client(hub: HubDouble, tmp_path: Path) -> TestClient:
    registry = make_registry(hub, tmp_path, ManualClock(), fit_of=partial(fit_of, get_machine(), KnownShapes()))
    app = FastAPI()
    problems.install(app)
    app.include_router(models.router)
    app.dependency_overrides[get_model_registry_service] = lambda: registry
    return TestClient(app)


def play(hub: HubDouble, item: Recorded) -> None:
    hub.replay(urlsplit(item.url).path, item.status, item.headers, item.body)


def check_summary(shown: dict[str, Any], said: dict[str, Any]) -> None:
    """Every field is what the Hub said, or null where it said nothing."""
    plain = {"downloads": "downloads", "likes": "likes", "task": "pipeline_tag", "library": "library_name"}
    assert shown["model_id"] == said["id"]
    assert {name: shown[name] for name in plain} == {name: said.get(key) for name, key in plain.items()}
    assert shown["tags"] == said.get("tags", [])
    assert shown["author"] == said.get("author", said["id"].split("/")[0] if "/" in said["id"] else None)
    assert shown["parameters"] == (said.get("safetensors") or {}).get("total")
    assert shown["gated"] == (said["gated"] is not False if "gated" in said else None)
    licenses = [tag.removeprefix("license:") for tag in said.get("tags", []) if tag.startswith("license:")]
    card = said.get("cardData") or {}
    assert shown["license"] == (licenses[0] if licenses else card.get("license"))
    architectures = (said.get("config") or {}).get("architectures")
    assert shown["architecture"] == (architectures[0] if architectures else None)
    for name, key in {"created_at": "createdAt", "modified_at": "lastModified"}.items():
        date = None if said.get(key) == NO_DATE else said.get(key)
        assert (shown[name] and datetime.fromisoformat(shown[name])) == (date and datetime.fromisoformat(date))
    assert (shown["local"], shown["size_bytes"]) == (False, None)  # none of these was asked for with sizes
    assert shown["fit"] is None  # and of none is a config at hand


@pytest.mark.parametrize("item", SINGLE, ids=lambda item: item.name)
def test_a_model_is_shown_as_the_hub_described_it(hub: HubDouble, client: TestClient, item: Recorded) -> None:
    said = json.loads(item.body)
    play(hub, item)
    response = client.get(f"/api/models/{urlsplit(item.url).path.removeprefix('/api/models/')}")
    assert response.status_code == 200, response.text
    shown = response.json()

    check_summary(shown, said)
    assert shown["sha"] == said.get("sha")
    assert shown["files"] == [{"path": file["rfilename"], "size_bytes": None} for file in said.get("siblings", [])]
    counted = (said.get("safetensors") or {}).get("parameters")
    assert shown["safetensors"] == ({"parameters_by_dtype": counted} if counted else None)
    assert shown["config"] is None
    languages = (said.get("cardData") or {}).get("language", [])
    expected = [languages] if isinstance(languages, str) else [name for name in languages if isinstance(name, str)]
    assert shown["languages"] == (expected if "cardData" in said else None)
    short = said.get("config") or {}
    if (short.get("tokenizer_config") or {}).get("chat_template") or short.get("chat_template_jinja"):
        assert shown["chat_template"] is True
    else:
        assert shown["chat_template"] in (False, None)


@pytest.mark.parametrize("item", LISTS, ids=lambda item: item.name)
def test_a_list_is_shown_as_the_hub_gave_it(hub: HubDouble, client: TestClient, item: Recorded) -> None:
    play(hub, item)
    shown = client.post("/api/models/search", json={"task": None, "limit": 100}).json()
    said = json.loads(item.body)

    assert len(shown["models"]) == len(said) > 900
    for ours, theirs in zip(shown["models"], said, strict=True):
        check_summary(ours, theirs)
    headers = {name.lower(): value for name, value in item.headers.items()}
    url = headers["link"].split(">")[0].removeprefix("<")
    assert [shown["next_cursor"]] == parse_qs(urlsplit(url).query)["cursor"]


@pytest.mark.parametrize("item", REDIRECTS, ids=lambda item: item.name)
def test_a_renamed_model_is_shown_under_its_new_name(hub: HubDouble, client: TestClient, item: Recorded) -> None:
    new_path = item.headers["Location"]
    target = next((other for other in SINGLE if urlsplit(other.url).path == new_path), None)
    assert target is not None, new_path
    play(hub, item)
    play(hub, target)
    shown = client.get(f"/api/models/{urlsplit(item.url).path.removeprefix('/api/models/')}").json()
    check_summary(shown, json.loads(target.body))


@pytest.mark.parametrize("item", REFUSALS, ids=lambda item: item.name)
def test_a_bad_token_is_said_to_be_one(
    hub: HubDouble, client: TestClient, monkeypatch: pytest.MonkeyPatch, item: Recorded
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    play(hub, item)
    response = client.post("/api/models/search", json={})
    assert (response.status_code, response.json()["type"]) == (403, "/problems/access-denied")


def test_all_kinds_of_answers_are_here() -> None:
    assert min(map(len, (LISTS, REDIRECTS, REFUSALS))) >= 1
    assert len(SINGLE) >= 40
