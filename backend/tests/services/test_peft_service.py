"""Loading, joining and giving way, with engines that take no time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import DoesNotFit, HubUnavailable, SettingRejected
from domain.configure import MachineFacts
from domain.memory.activations import Batch
from domain.memory.unsloth import UnslothHere
from domain.memory.verdict import Assessment, assess
from domain.models.load_states import LoadState
from domain.peft.algorithms import Algorithm
from services.adapter_service import AdapterService
from services.generation_service import GenerationService
from services.hardware.devices import Device, EngineChoice, choose_engine
from services.hardware.machine import Machine
from services.peft_service import ConfiguredLoad, LoadedModel, LoadRequest, PeftService
from store.database import Database
from tests.support.engine_double import SHORT_ANSWER, EngineDoubles
from tests.support.hub_double import ManualClock
from tests.support.little_memory import FAR_ID, GRACE_S, IDLE_S, load, peft_with_little_memory


def _for_client(name: str) -> LoadRequest:
    return LoadRequest(name, None, Algorithm.LORA, None, {}, "auto", "auto", force=False)


def _for_job(peft: PeftService, name: str) -> ConfiguredLoad:
    config = peft.configure(Algorithm.LORA, None, {}, peft.on_device(name, None)).config
    return ConfiguredLoad(name, None, Algorithm.LORA, config)


def _load(peft: PeftService, name: str, *, for_job: bool = False) -> LoadedModel:
    model = load(peft, _for_job(peft, name) if for_job else _for_client(name))
    assert model.state is LoadState.READY, model.base.error
    return model


def test_while_an_engine_that_gives_way_takes_long_to_end_everything_else_answers(
    peft: PeftService, engines: EngineDoubles, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _load(peft, "a/first")
    engine = engines.started[0]
    end, ending, may_end = engine.close, threading.Event(), threading.Event()

    def end_late() -> None:
        ending.set()
        assert may_end.wait(600)
        end()

    monkeypatch.setattr(engine, "close", end_late)
    clock.advance(GRACE_S)
    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(_load, peft, "a/second")
        assert ending.wait(600)
        try:
            assert threads.submit(peft.models).result(600) == []
        finally:
            may_end.set()
        loaded = second.result(600)
        assert peft.models() == [loaded]


def test_what_a_client_asks_for_again_was_used_just_now(peft: PeftService, clock: ManualClock) -> None:
    first = _load(peft, "a/first")
    clock.advance(10 * GRACE_S)
    assert _load(peft, "a/first") is first
    with pytest.raises(DoesNotFit):
        _load(peft, "a/second")
    assert not first.base.retire(IDLE_S)


def test_what_a_job_loaded_does_not_give_way_before_the_job_takes_it(peft: PeftService, clock: ManualClock) -> None:
    first = _load(peft, "a/first", for_job=True)
    with first.base.awaited():
        clock.advance(10 * IDLE_S)
        with pytest.raises(DoesNotFit):
            _load(peft, "a/second")
        assert not first.base.retire(IDLE_S)
    _load(peft, "a/second")


def test_what_a_client_begins_to_use_does_not_give_way_as_a_jobs(peft: PeftService) -> None:
    first = _load(peft, "a/first", for_job=True)
    assert first.base.idle_for(GRACE_S, unkept_s=0.0)
    first.base.engine(for_client=True)
    assert not first.base.retire(GRACE_S, unkept_s=0.0)


def test_a_load_that_failed_is_shown_to_the_client_who_asked_and_not_kept_for_a_job(peft: PeftService) -> None:
    for _ in range(3):  # as often as the job is tried again
        model = load(peft, _for_job(peft, FAR_ID))
        assert model.state is LoadState.FAILED and isinstance(model.base.error, HubUnavailable)
    assert peft.models() == []
    model = load(peft, _for_client(FAR_ID))
    assert peft.models() == [model] and model.state is LoadState.FAILED


def test_an_adapter_on_a_base_that_is_being_unloaded_is_off_it(peft: PeftService, clock: ManualClock) -> None:
    first = _load(peft, "a/first")
    first.base.attached("adp_1", 1)
    clock.advance(IDLE_S)
    assert first.base.retire(IDLE_S)
    peft.detach_everywhere("adp_1")


def test_what_a_job_needs_is_loaded_as_configured_though_the_rules_refuse_it_by_now(
    peft: PeftService, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = _for_job(peft, "a/first")

    def refuse(*_: Any, **__: Any) -> None:
        raise SettingRejected("rank: no rank is allowed any more")

    monkeypatch.setattr("services.peft_service.configure", refuse)
    with pytest.raises(SettingRejected):
        peft.load(_for_client("a/first"))
    model = load(peft, request)
    assert model.state is LoadState.READY and model.config == request.config == model.base.wanted.config
    assert peft.load(request) is model


def test_what_a_job_needs_is_refused_on_a_device_that_cannot_compute_it(peft: PeftService) -> None:
    request = _for_job(peft, "a/first")
    of_a_gpu = request.config.model_copy(update={"precision": "fp16", "optimizer": "adamw_8bit"})
    with pytest.raises(SettingRejected, match=r"fp16 needs a CUDA GPU.*8-bit optimizer needs") as caught:
        peft.load(replace(request, config=of_a_gpu))
    assert [error["location"] for error in caught.value.extras["errors"]] == [["precision"], ["optimizer"]]
    assert peft.models() == []


def test_a_model_does_not_give_way_between_the_look_and_the_command(
    peft: PeftService, engines: EngineDoubles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = _load(peft, "a/first", for_job=True)
    command = engines.started[0].request
    gave_way: list[bool] = []

    def request(*arguments: Any) -> Any:
        gave_way.append(first.base.retire(0.0, unkept_s=0.0))
        return command(*arguments)

    monkeypatch.setattr(engines.started[0], "request", request)
    adapters = AdapterService(Database(f"sqlite:///{tmp_path}/studio.db"), tmp_path / "adapters", peft)
    GenerationService(peft, adapters).start(first.id, SHORT_ANSWER)
    assert gave_way == [False] and first.base.retire(0.0)


class WithUnsloth(Machine):
    """A GPU with room, on which Unsloth holds what it can."""

    def __init__(self) -> None:
        self._facts = MachineFacts(has_gpu=True, supports_bf16=True, unsloth=UnslothHere(2**36))

    def device(self, wanted: str | int) -> Device:
        return Device("cuda:0", self._facts, 2**35, "GPU-0", "9.0")

    def engine(self, wanted: str, device: Device, obstacle: str | None) -> EngineChoice:
        return choose_engine(wanted, device, EngineChoice("unsloth", "a GPU of 9.0"), obstacle)


def test_a_run_is_estimated_for_the_engine_that_holds_its_base(
    clock: ManualClock, engines: EngineDoubles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = peft_with_little_memory(clock, engines, "bf16", tmp_path, machine=WithUnsloth())
    judged: list[str] = []

    def judge(*arguments: Any, **named: Any) -> Assessment:
        found = assess(*arguments, **named)
        assert found.estimate is not None
        judged.append(found.estimate.engine)
        return found

    monkeypatch.setattr("services.peft_service.assess", judge)
    try:
        for engine in ("unsloth", "transformers"):
            model = load(service, replace(_for_client("a/first"), engine=engine))
            assert model.base.key.engine == engine
            where = service.on_device("a/first", None, loaded=model)
            assert (where.device.facts.unsloth is not None) == (engine == "unsloth")
            judged.clear()
            service.admit_run(where, model.config, Batch(2, 64, masked=True))
            assert set(judged) == {engine}
        asked = ("a/first", None, model.config)
        advice = [service.savings(*asked, on_gpu=True, on_unsloth=on_unsloth) for on_unsloth in (True, False)]
        assert advice[0] != advice[1]
    finally:
        service.close()
