"""Idle models give way to what needs their memory, and nothing else does.

The machine has room for one load and a half, and the engines take no time.
"""

from pathlib import Path

import pytest

from core.errors import DoesNotFit, LoadedModelNotFound
from domain.memory.activations import Batch
from domain.models.load_states import LoadState
from domain.peft.algorithms import Algorithm
from services.adapter_service import AdapterService
from services.engines.warm import EngineKind, Engines, HostMemory
from services.generation_service import GenerationService
from services.loading.borrowing import borrow
from services.peft_service import ConfiguredLoad, LoadedModel, LoadRequest, PeftService
from store.database import Database
from tests.support.engine_double import SHORT_ANSWER, EngineDoubles
from tests.support.hub_double import ManualClock
from tests.support.little_memory import GRACE_S, IDLE_S, load, peft_with_little_memory

FP32 = {"precision": "fp32"}  # where memory is short the default would be bf16, and two bases fit


@pytest.fixture
def precision() -> str:
    return "fp32"


def _load(peft: PeftService, name: str, *, for_job: bool = False) -> LoadedModel:
    if for_job:
        config = peft.configure(Algorithm.LORA, None, FP32, peft.on_device(name, None)).config
        model = load(peft, ConfiguredLoad(name, None, Algorithm.LORA, config))
    else:
        model = load(peft, LoadRequest(name, None, Algorithm.LORA, None, FP32, "auto", "auto", force=False))
    assert model.state is LoadState.READY, model.base.error
    return model


def test_a_model_that_was_just_used_does_not_give_way(
    peft: PeftService, engines: EngineDoubles, clock: ManualClock
) -> None:
    _load(peft, "a/first")
    clock.advance(GRACE_S - 1)
    with pytest.raises(DoesNotFit):
        _load(peft, "a/second")
    assert len(engines.alive) == 1


def test_an_idle_model_gives_way_and_its_engine_is_gone_before_the_next_loads(
    peft: PeftService, engines: EngineDoubles, clock: ManualClock
) -> None:
    first = _load(peft, "a/first")
    clock.advance(GRACE_S)
    second = _load(peft, "a/second")
    assert engines.others_at_start == [0, 0]
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


def test_nothing_is_unloaded_for_what_would_not_fit_even_then(
    peft: PeftService, engines: EngineDoubles, clock: ManualClock
) -> None:
    first = _load(peft, "a/first")
    clock.advance(10 * GRACE_S)
    config = peft.configure(Algorithm.LORA, None, {"batch_size": 1024, "max_seq_length": 2048}).config
    with pytest.raises(DoesNotFit):
        peft.admit_run(peft.on_device("a/second", None), config, Batch(1024, 2048, True))
    assert peft.models() == [first] and len(engines.alive) == 1


def test_a_run_makes_room_but_keeps_the_base_it_runs_on(
    peft: PeftService, engines: EngineDoubles, clock: ManualClock
) -> None:
    own = _load(peft, "a/own")
    clock.advance(10 * GRACE_S)
    config = own.config
    with pytest.raises(DoesNotFit):
        peft.admit_run(peft.on_device("a/own", None, loaded=own), config, Batch(1024, 2048, True))
    assert peft.models() == [own] and len(engines.alive) == 1


def test_an_answer_that_takes_long_is_no_idle_time(
    peft: PeftService, engines: EngineDoubles, clock: ManualClock, tmp_path: Path
) -> None:
    model = _load(peft, "a/first")
    engines.started[0].takes_long = True
    adapters = AdapterService(Database(f"sqlite:///{tmp_path}/studio.db"), tmp_path / "adapters", peft)
    GenerationService(peft, adapters).start(model.id, SHORT_ANSWER)
    clock.advance(10 * IDLE_S)
    assert not model.base.retire(IDLE_S)
    engines.started[0].answer()
    assert model.base.use.last_s == clock.monotonic()
    assert not model.base.retire(IDLE_S)
    clock.advance(IDLE_S)
    assert model.base.retire(IDLE_S) and not model.base.retire(IDLE_S)


def test_engines_that_are_kept_ready_give_way_first_and_count_as_free(
    clock: ManualClock, engines: EngineDoubles, precision: str, tmp_path: Path
) -> None:
    """As many bytes as the load needs are held by one that holds nothing that anybody needs."""
    kept = Engines(
        clock, engines, lambda: [EngineKind("transformers", "GPU-of-another")], lambda: HostMemory(2**40, 2**40),
        log_dir=tmp_path, silence_s=60.0, most_bytes=2**40,
    )  # fmt: skip
    peft = peft_with_little_memory(clock, engines, precision, tmp_path, kept)
    free = peft.device("cpu").available_bytes
    kept._look()
    assert len(engines.alive) == 1 and peft.device("cpu").available_bytes == free
    model = _load(peft, "a/first")
    assert len(engines.alive) == 1 and engines.alive[0] is model.base.process and kept.standing() == []
    clock.advance(3600)
    with model.base.awaited(), borrow(model, "training", lambda *_: None):
        kept._look()
        assert kept.standing() == []  # the run was admitted with the memory as it was
    peft.close()
