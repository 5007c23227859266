"""A base is lent to one at a time, waited for, and given back whatever happens."""

from typing import Any

import pytest

from core.errors import HubUnavailable, ModelBusy, ModelNotReady
from domain.models.load_states import LoadState
from domain.peft.algorithms import Algorithm
from domain.results import Loaded
from services.loading.borrowing import borrow
from services.loading.loaded_base import LoadedBase
from services.loading.loaded_model import LoadedModel
from services.models.progress import LoadProgress
from tests.support.bases import CONFIG, base_request
from tests.support.engine_double import EngineDouble
from tests.support.hub_double import ManualClock


class Stopped(Exception):
    """Whoever waited is told to stop."""


@pytest.fixture
def model() -> LoadedModel:
    base = LoadedBase(base_request("a/base"), ManualClock())
    engine = EngineDouble(None, 1)
    base.adopt(engine)
    base.report("loading", LoadProgress(0.25))
    return LoadedModel("mdl_1", "a/base", None, Algorithm.LORA, CONFIG, base, None, None, {})


def _ready(model: LoadedModel) -> None:
    model.base.ready(Loaded(total_parameters=1, memory_bytes=1, load_s=0.1))


def test_the_load_is_waited_for_and_then_whoever_holds_the_base(model: LoadedModel) -> None:
    waited: list[tuple[str, float | None]] = []

    def wait(what: str, fraction: float | None) -> None:
        waited.append((what, fraction))
        assert model.base.use.awaited == 1
        if model.state is LoadState.LOADING:
            _ready(model)
            model.base.acquire("training job_1")
        else:
            model.base.release()

    with borrow(model, "exporting exp_1", wait) as process:
        assert process is model.base.process
        assert (model.state, model.base.busy_with) == (LoadState.BUSY, "exporting exp_1")
        with pytest.raises(ModelBusy, match="exporting exp_1"):
            model.base.engine()
    assert waited == [("loading the base", 0.25), ("waiting for the base, which is training job_1", None)]
    assert model.state is LoadState.READY and model.base.use.awaited == 0


@pytest.mark.parametrize("loaded", [False, True])
def test_who_stops_waiting_leaves_nothing_behind(model: LoadedModel, loaded: bool) -> None:
    if loaded:
        _ready(model)
        model.base.acquire("training job_1")

    def stop(*_: Any) -> None:
        raise Stopped

    with pytest.raises(Stopped), borrow(model, "exporting exp_1", stop):
        pytest.fail("it is not to be had")
    assert model.base.use.awaited == 0
    assert model.base.busy_with == ("training job_1" if loaded else None)


def test_a_base_is_given_back_when_the_work_fails(model: LoadedModel) -> None:
    _ready(model)
    with pytest.raises(Stopped), borrow(model, "training job_1", lambda *_: None):
        raise Stopped
    assert model.state is LoadState.READY and model.base.use.awaited == 0


def test_a_load_that_fails_fails_who_waits_with_its_error(model: LoadedModel) -> None:
    error = HubUnavailable("away")
    with pytest.raises(HubUnavailable) as caught, borrow(model, "training job_1", lambda *_: model.base.fail(error)):
        pytest.fail("there is no base")
    assert caught.value is error
    model.base.begin_unloading()
    with pytest.raises(ModelNotReady, match="unloading"), borrow(model, "training job_1", lambda *_: None):
        pytest.fail("there is no base any more")
