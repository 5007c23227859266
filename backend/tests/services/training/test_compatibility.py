"""The verdict on a model that a load would refuse, from the registry to the answer."""

import json
from pathlib import Path
from typing import cast

import pytest

from domain.configure import MachineFacts
from domain.peft.algorithms import Algorithm
from services.hardware.devices import Device
from services.models.embedded import CONFIG
from services.models.facts import ModelFacts
from services.peft_service import PeftService
from services.training.compatibility import CompatibilityService
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
