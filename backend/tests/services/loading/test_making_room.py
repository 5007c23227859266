"""Idle models give way to what needs their memory, and nothing else does: real engines on a machine of a given size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.errors import DoesNotFit, LoadedModelNotFound
from domain import protocol
from domain.configure import MachineFacts
from domain.memory.activations import Batch
from domain.memory.estimate import loading_bytes
from domain.models.architectures.registry import read_shape
from domain.models.load_states import LoadState
from domain.peft.algorithms import Algorithm
from services.hardware.devices import Device, EngineChoice
from services.loading.borrowing import borrow
from services.models.embedded import CONFIG
from services.peft_service import ConfiguredLoad, LoadedModel, LoadRequest, PeftService
from tests.support.hub_double import ManualClock
from tests.support.server import wait_until

pytestmark = pytest.mark.engine
GRACE_S, IDLE_S = 60.0, 1800.0
FP32 = {"precision": "fp32"}  # where memory is short the default would be bf16, and two bases fit


class _Files:
    """Every id is the one tiny model."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, *_: Any, **__: Any) -> None:
        return

    def ensure(self, *_: Any, **__: Any) -> Path:
        return self._path


class _Facts:
    """Says that each has the embedded model's shape, so that the estimate is well above an engine's own size."""

    def shape(self, *_: Any) -> Any:
        return read_shape(CONFIG)

    def siblings(self, _: Any) -> list[Any]:
        return []


class _Machine:
    """A CPU with room for one load and a half; what the engines hold is measured."""

    def __init__(self) -> None:
        self.service: PeftService | None = None
        self.total_bytes = 0

    def device(self, _: str | int) -> Device:
        models = self.service.models() if self.service is not None else []
        bases = {id(model.base): model.base for model in models if model.base.usable}
        held = sum(base.wanted.needed_bytes or 0 for base in bases.values())
        return Device("cpu", MachineFacts(has_gpu=False, supports_bf16=False), self.total_bytes - held)

    def engine(self, *_: Any) -> EngineChoice:
        return EngineChoice("transformers", "the only one")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def peft(clock: ManualClock, tiny_path: Path, tmp_path: Path) -> Iterator[PeftService]:
    machine: Any = _Machine()
    files: Any = _Files(tiny_path)
    facts: Any = _Facts()
    service = PeftService(
        clock, machine, files, facts,
        log_dir=tmp_path, idle_unload_s=IDLE_S, make_room_after_s=GRACE_S, engine_silence_s=60.0,
    )  # fmt: skip
    config = service.configure(Algorithm.LORA, None, FP32).config
    shape = read_shape(CONFIG)
    assert shape is not None
    machine.service, machine.total_bytes = service, int(1.5 * loading_bytes(shape, config, on_gpu=False))
    yield service
    service.close()


def _load(peft: PeftService, name: str, *, for_job: bool = False) -> LoadedModel:
    if for_job:
        config = peft.configure(Algorithm.LORA, None, FP32, peft.on_device(name, None)).config
        model = peft.load(ConfiguredLoad(name, None, Algorithm.LORA, config))
    else:
        model = peft.load(LoadRequest(name, None, Algorithm.LORA, None, FP32, "auto", "auto", force=False))
    assert model.base.loading is not None
    model.base.loading.result(60)
    assert model.state is LoadState.READY, model.base.error
    # What it holds by the estimate: the tiny model's engine is far smaller than the shape it stands for.
    process: Any = model.base.process
    process.resident_bytes = lambda: model.base.wanted.needed_bytes
    return model


def _pid(model: LoadedModel) -> int:
    assert model.base.process is not None
    return model.base.process.pid


def test_a_model_that_was_just_used_does_not_give_way(peft: PeftService, clock: ManualClock) -> None:
    first = _load(peft, "a/first")
    clock.advance(GRACE_S - 1)
    with pytest.raises(DoesNotFit):
        _load(peft, "a/second")
    assert psutil.pid_exists(_pid(first))


def test_an_idle_model_gives_way_and_its_engine_is_gone_before_the_next_loads(
    peft: PeftService, clock: ManualClock
) -> None:
    first = _load(peft, "a/first")
    pid = _pid(first)
    clock.advance(GRACE_S)
    second = _load(peft, "a/second")
    assert not psutil.pid_exists(pid)
    assert first.state is LoadState.UNLOADING and first.base.process is None
    with pytest.raises(LoadedModelNotFound):
        peft.get(first.id)
    assert peft.models() == [second]


def test_what_a_job_loaded_for_itself_gives_way_at_once(peft: PeftService) -> None:
    _load(peft, "a/first", for_job=True)
    second = _load(peft, "a/second", for_job=True)
    assert peft.models() == [second]


def test_a_client_who_asks_for_what_a_job_loaded_keeps_it(peft: PeftService) -> None:
    job = _load(peft, "a/first", for_job=True)
    assert _load(peft, "a/first").base is job.base
    with pytest.raises(DoesNotFit):
        _load(peft, "a/second", for_job=True)


def test_a_model_that_works_never_gives_way(peft: PeftService, clock: ManualClock) -> None:
    first = _load(peft, "a/first")
    with borrow(first, "training", lambda *_: pytest.fail("it is free")):
        clock.advance(10 * GRACE_S)
        with pytest.raises(DoesNotFit):
            _load(peft, "a/second")
    clock.advance(GRACE_S)
    _load(peft, "a/second")


def test_nothing_is_unloaded_for_what_would_not_fit_even_then(peft: PeftService, clock: ManualClock) -> None:
    first = _load(peft, "a/first")
    clock.advance(10 * GRACE_S)
    config = peft.configure(Algorithm.LORA, None, {"batch_size": 1024, "max_seq_length": 2048}).config
    with pytest.raises(DoesNotFit):
        peft.admit_run(peft.on_device("a/second", None), config, Batch(1024, 2048, True))
    assert peft.models() == [first] and psutil.pid_exists(_pid(first))


def test_a_run_makes_room_but_keeps_the_base_it_runs_on(peft: PeftService, clock: ManualClock) -> None:
    own = _load(peft, "a/own")
    clock.advance(10 * GRACE_S)
    config = own.config
    with pytest.raises(DoesNotFit):
        peft.admit_run(peft.on_device("a/own", None, loaded=own), config, Batch(1024, 2048, True))
    assert peft.models() == [own] and psutil.pid_exists(_pid(own))


def test_an_answer_that_takes_long_is_no_idle_time(peft: PeftService, clock: ManualClock) -> None:
    model = _load(peft, "a/first")
    process = model.base.engine()
    _, future = process.request(
        lambda request_id: protocol.Generate(
            request_id=request_id, messages=None, prompt="the", adapter_id=None, max_new_tokens=200,
            temperature=0.0, top_p=1.0, seed=None, stop=[],
        )
    )  # fmt: skip
    clock.advance(10 * IDLE_S)
    busy = process.has_pending
    assert not busy or not model.base.retire(IDLE_S)
    future.add_done_callback(lambda _: model.base.touch())
    future.result(60)
    wait_until(lambda: model.base.use.last_s == clock.monotonic())
    assert not model.base.retire(IDLE_S)
    clock.advance(IDLE_S)
    assert model.base.retire(IDLE_S) and not model.base.retire(IDLE_S)
