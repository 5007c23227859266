"""What a load or a run may use: what is free, less what is promised, and what its own base holds already."""

import pytest

from core.clock import SystemClock
from core.errors import DoesNotFit, HubUnavailable
from domain.configure import MachineFacts, configure
from domain.memory.unsloth import UnslothHere
from domain.memory.verdict import assess
from domain.models.load_states import LoadState
from domain.peft.algorithms import Algorithm
from domain.results import Loaded
from services.hardware.devices import Device
from services.loading.admission import refuse_what_does_not_fit, with_room
from services.loading.base_request import BaseKey
from services.loading.loaded_base import LoadedBase
from services.models.embedded import CONFIG
from services.models.progress import LoadProgress
from tests.support.bases import CPU, DEVICE, base_request
from tests.support.engine_double import EngineDouble
from tests.support.shapes import shape_of


def _base(state: LoadState, needed: int, resident: int | None = None, device: str = "cpu") -> LoadedBase:
    base = LoadedBase(base_request("me/model", device=device, needed_bytes=needed), SystemClock())
    base.process = EngineDouble(None, resident) if resident is not None else None
    if state in (LoadState.LOADING, LoadState.READY):
        base.report("loading", LoadProgress())
    if state is LoadState.DOWNLOADING:
        base.report("downloading", LoadProgress())
    if state is LoadState.READY:
        base.ready(Loaded(total_parameters=1, memory_bytes=1, load_s=0.1))
    if state is LoadState.FAILED:
        base.fail(HubUnavailable("away"))
    assert base.state is state
    return base


@pytest.mark.parametrize(
    ("bases", "room"),
    [
        ([], 1000),
        ([_base(LoadState.QUEUED, 300), _base(LoadState.DOWNLOADING, 200)], 500),
        ([_base(LoadState.LOADING, 300, resident=100)], 800),
        ([_base(LoadState.LOADING, 300, resident=400)], 1000),
        ([_base(LoadState.READY, 300, resident=300), _base(LoadState.FAILED, 300)], 1000),
        ([_base(LoadState.QUEUED, 300, device="cuda:0")], 1000),
        ([_base(LoadState.QUEUED, 3000)], 0),
    ],
)
def test_loads_under_way_are_promised_what_they_have_not_taken(bases: list[LoadedBase], room: int) -> None:
    assert with_room(DEVICE, bases).available_bytes == room


def test_a_run_counts_what_its_own_base_holds_or_is_promised_as_its_own() -> None:
    own, other = _base(LoadState.READY, 300, resident=350), _base(LoadState.QUEUED, 100)
    assert with_room(DEVICE, [own, other], own).available_bytes == 1250
    waiting = _base(LoadState.QUEUED, 300)
    assert with_room(DEVICE, [waiting, other], waiting).available_bytes == 900


def test_a_device_that_does_not_say_what_is_free_stays_so() -> None:
    assert with_room(Device("cuda:0", CPU, None), [_base(LoadState.QUEUED, 1)]).available_bytes is None


def test_the_refusal_carries_the_estimate_and_what_to_do() -> None:
    config = configure(Algorithm.LORA, use_case=None, overrides={"max_seq_length": 256}, machine=CPU).config
    found = assess(shape_of(CONFIG), config, 10**9, on_gpu=False)
    with pytest.raises(DoesNotFit) as caught:
        refuse_what_does_not_fit(found, "Training me/model", DEVICE)
    extras = caught.value.extras
    assert extras["estimate_bytes"] == extras["estimate"]["total_bytes"] > extras["available_bytes"] == 10**9
    assert extras["suggestions"][0].keys() == {"change", "overrides", "estimate_bytes", "verdict"}


def test_a_run_for_which_the_host_has_too_little_is_refused_with_both_figures() -> None:
    little = MachineFacts(has_gpu=True, supports_bf16=True, unsloth=UnslothHere(2**20))
    asked = {"gradient_checkpointing": True}
    config = configure(Algorithm.LORA, use_case=None, overrides=asked, machine=little).config
    found = assess(shape_of(CONFIG), config, 2**40, on_gpu=True, unsloth=little.unsloth)
    with pytest.raises(DoesNotFit, match=f"of host memory, where {2**20} are free") as caught:
        refuse_what_does_not_fit(found, "Training me/model", Device("cuda:0", little, 2**40))
    assert caught.value.extras["suggestions"][0]["overrides"] == {"gradient_checkpointing": False}


@pytest.mark.parametrize("available", [None, 2**50])
def test_what_fits_or_is_not_known_is_admitted(available: int | None) -> None:
    config = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU).config
    refuse_what_does_not_fit(assess(shape_of(CONFIG), config, available, on_gpu=False), "x", DEVICE)
    refuse_what_does_not_fit(assess(None, config, available, on_gpu=False), "x", DEVICE)


def test_a_base_of_unsloth_serves_what_is_no_longer_than_it_was_loaded_for() -> None:
    config = configure(Algorithm.LORA, use_case=None, overrides={"max_seq_length": 256}, machine=CPU).config
    transformers = BaseKey("me/model", None, "none", config.precision, "cpu", "transformers")
    unsloth = BaseKey("me/model", None, "none", config.precision, "cuda:0", "unsloth", 256)
    longer = config.model_copy(update={"max_seq_length": 257})
    assert transformers.serves(config) and transformers.serves(longer)
    assert unsloth.serves(config) and not unsloth.serves(longer)
    assert not unsloth.serves(config.model_copy(update={"quantization": "nf4"}))
