"""A base changes its state as the table allows, whatever is done to it and in whichever order."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import HubUnavailable, ModelBusy, ModelNotReady, TransitionNotPermitted
from domain.models.load_states import UNDER_WAY, LoadState, may_change
from domain.results import Loaded
from services.loading.loaded_base import LoadedBase
from services.models.progress import LoadProgress
from tests.support.bases import base_request
from tests.support.engine_double import EngineDouble
from tests.support.hub_double import ManualClock

RESULT = Loaded(total_parameters=1, memory_bytes=1, load_s=0.1)
ACTIONS: dict[str, Any] = {
    "download": lambda base: base.report("downloading", LoadProgress(0.5)),
    "load": lambda base: base.report("loading", LoadProgress(0.5)),
    "ready": lambda base: base.ready(RESULT),
    "fail": lambda base: base.fail(HubUnavailable("away")),
    "acquire": lambda base: base.acquire("training"),
    "release": lambda base: base.release(),
    "use": lambda base: base.engine(for_client=True),
    "join": lambda base: base.join(for_client=False),
    "retire": lambda base: base.retire(0.0),
    "unload": lambda base: base.begin_unloading(),
    "close": lambda base: base.begin_unloading(though_busy=True),
}


def base_with_engine() -> LoadedBase:
    base = LoadedBase(base_request("a/base"), ManualClock())
    engine = EngineDouble(None, 1)
    assert base.adopt(engine)
    return base


@given(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=30))
def test_every_change_is_in_the_table(actions: list[str]) -> None:
    base = base_with_engine()
    for action in actions:
        before = base.state
        try:
            ACTIONS[action](base)
        except (ModelBusy, ModelNotReady, TransitionNotPermitted):
            assert base.state is before, action
        assert base.state is before or may_change(before, base.state), (action, before, base.state)
        assert base.settled == (base.state not in UNDER_WAY)
        assert base.state is not LoadState.BUSY or base.busy_with == "training"
        assert (base.state is LoadState.FAILED) <= (base.error is not None)


@pytest.mark.parametrize("late", ["download", "load", "ready", "fail", "release"])
def test_a_base_that_is_being_unloaded_stays_so_whatever_is_still_reported(late: str) -> None:
    base = base_with_engine()
    base.begin_unloading()
    ACTIONS[late](base)
    assert base.state is LoadState.UNLOADING and base.error is None
    engine = EngineDouble(None, 1)
    assert not base.adopt(engine)


@pytest.mark.parametrize("action", ["download", "load", "ready"])
def test_what_the_table_does_not_know_is_refused(action: str) -> None:
    base = base_with_engine()
    base.fail(HubUnavailable("away"))
    with pytest.raises(TransitionNotPermitted, match="cannot go from failed"):
        ACTIONS[action](base)


def test_who_waits_for_the_end_of_a_load_that_fails_finds_its_error() -> None:
    base, seen = base_with_engine(), list[Any]()
    settle = base._settled.set

    def look() -> None:
        seen.append((base.error, base.memory_bytes))
        settle()

    base._settled.set = look  # type: ignore[method-assign]
    error = HubUnavailable("away")
    base.fail(error)
    assert seen == [(error, None)]


def test_a_job_that_held_a_base_whose_engine_died_leaves_it_failed() -> None:
    base = base_with_engine()
    ACTIONS["load"](base)
    base.ready(RESULT)
    base.acquire("training")
    base.fail(ModelNotReady("The engine ended."))
    base.release()
    assert base.state is LoadState.FAILED and base.busy_with is None
