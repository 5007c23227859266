"""The verdict on a model that a load would refuse, from the registry to the answer."""

import json
from pathlib import Path
from typing import cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.compatibility import router
from domain.configure import MachineFacts
from domain.memory.unsloth import UnslothHere
from domain.peft.algorithms import Algorithm
from services.hardware.devices import Device
from services.models.embedded import CONFIG
from services.models.facts import ModelFacts
from services.peft_service import PeftService
from services.training.compatibility import CompatibilityService, get_compatibility_service
from tests.support.hub_double import HubDouble, ManualClock, safetensors_bytes
from tests.support.registries import make_registry
from tests.support.shapes import KnownShapes

DEVICE = Device("cpu", MachineFacts(has_gpu=False, supports_bf16=False), 2**40)
FILES = {
    "config.json": json.dumps(dict(CONFIG)).encode(),
    "model.safetensors": safetensors_bytes({"w": ("BF16", (4,))}),
}


class Peft:
    """A CPU with room for everything."""

    def device(self, _: str | int) -> Device:
        return DEVICE


@pytest.fixture
def service(hub: HubDouble, tmp_path: Path) -> CompatibilityService:
    facts = ModelFacts(make_registry(hub, tmp_path, ManualClock()), KnownShapes())
    return CompatibilityService(facts, cast(PeftService, Peft()))


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("asks", [True, False])
def test_code_of_its_own_blocks_a_model_wherever_it_is(
    hub: HubDouble, service: CompatibilityService, tmp_path: Path, asks: bool, here: bool
) -> None:
    config = {**CONFIG, "auto_map": {"AutoModel": "x.X"}} if asks else dict(CONFIG)
    files = FILES | {"config.json": json.dumps(config).encode()}
    if here:
        folder = tmp_path / "models" / "me" / "m"
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    else:
        hub.add_model("me/m", files)
    found = service.check("me/m", None, Algorithm.LORA, {}, "auto", None)
    assert found.verdict == ("unknown" if asks else "fits")
    assert ["own Python" in reason for reason in found.blockers] == ([True] if asks else [])


@pytest.mark.parametrize("gated", [False, "manual"])
def test_a_model_that_the_hub_has_disabled_is_blocked(
    hub: HubDouble, service: CompatibilityService, gated: object
) -> None:
    hub.add_model("me/m", FILES, gated=gated, disabled=True)
    found = service.check("me/m", None, Algorithm.LORA, {}, "auto", None)
    assert (found.verdict, found.estimate) == ("unknown", None)
    (reason,) = found.blockers
    assert "disabled by the Hub" in reason


@pytest.mark.parametrize("host_bytes", [2**36, 2**20])
def test_the_answer_names_the_engine_and_what_it_takes_of_the_host(
    hub: HubDouble, tmp_path: Path, host_bytes: int
) -> None:
    hub.add_model("me/m", FILES)
    facts = ModelFacts(make_registry(hub, tmp_path, ManualClock()), KnownShapes())
    machine = MachineFacts(has_gpu=True, supports_bf16=True, unsloth=UnslothHere(host_bytes))

    class PeftOnGpu:
        def device(self, _: str | int) -> Device:
            return Device("cuda:0", machine, 2**37, "GPU-0", "9.0")

    app = FastAPI()
    app.include_router(router)
    service = CompatibilityService(facts, cast(PeftService, PeftOnGpu()))
    app.dependency_overrides[get_compatibility_service] = lambda: service
    with TestClient(app) as client:
        asked = {"model_id": "me/m", "gradient_checkpointing": True}
        found = client.post("/api/models/compatibility", json=asked).json()
    assert found["estimate"]["engine"] == "unsloth"
    assert found["estimate"]["host_bytes"] > 2**20
    assert any("host memory" in reason for reason in found["reasons"])
    assert found["verdict"] == ("fits" if host_bytes == 2**36 else "does_not_fit")
    if host_bytes == 2**20:
        (suggested,) = found["suggestions"]
        assert (suggested["overrides"], suggested["verdict"]) == ({"gradient_checkpointing": False}, "fits")
