"""Bases in memory and what their owner keeps about them: they come and go in one step."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import EngineUnavailable, ModelBusy, ModelNotReady
from domain.memory.verdict import Assessment
from domain.models.load_states import LoadState
from services.engines.process import EngineProcess
from services.hardware.devices import Device
from services.hardware.machine import Machine
from services.loading.loaded_base import LoadedBase
from services.loading.pool import BasePool
from tests.support.bases import DEVICE, FREE_BYTES, base_request
from tests.support.engine_double import EngineDoubles
from tests.support.hub_double import ManualClock
from tests.support.little_memory import EveryModelsFiles
from tests.support.no_warm_engines import engines_on_demand

IDLE_S = 1800.0


class OneDevice(Machine):
    """A machine of one CPU."""

    def __init__(self) -> None:
        pass

    def device(self, wanted: str | int) -> Device:
        return DEVICE


class Owner:
    """Keeps a name for each base, and notes whether others could have looked when it changed that."""

    def __init__(self) -> None:
        self.pool: BasePool
        self.names: dict[str, LoadedBase] = {}
        self.held: list[bool] = []
        self.engines_at_forgetting: list[EngineProcess | None] = []

    def register(self, base: LoadedBase) -> LoadedBase:
        self._look()
        self.names[base.key.model_id] = base
        return base

    def forgotten(self, base: LoadedBase) -> None:
        self._look()
        self.engines_at_forgetting.append(base.process)
        self.names = {name: kept for name, kept in self.names.items() if kept is not base}

    def _look(self) -> None:
        with ThreadPoolExecutor(1) as other:
            got = other.submit(self.pool.lock.acquire, blocking=False).result()
            if got:
                other.submit(self.pool.lock.release).result()
        self.held.append(not got)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def pool(clock: ManualClock, owner: Owner, engines: EngineDoubles, tmp_path: Path) -> Iterator[BasePool]:
    pool = BasePool(
        clock, OneDevice(), EveryModelsFiles(), engines_on_demand(engines), owner.forgotten,
        log_dir=tmp_path, idle_unload_s=IDLE_S, make_room_after_s=60.0, engine_silence_s=60.0,
    )  # fmt: skip
    owner.pool = pool
    yield pool
    pool.close()


def fits(device: Device) -> Assessment:
    return Assessment("fits", device.available_bytes, None)


def _load(pool: BasePool, owner: Owner, name: str, *, for_client: bool = True) -> LoadedBase:
    base = pool.join_or_start(base_request(name, for_client=for_client), fits, owner.register)
    assert base.loading is not None
    base.loading.result(600)
    return base


def test_nobody_sees_a_base_without_what_is_kept_about_it(pool: BasePool, owner: Owner) -> None:
    base = _load(pool, owner, "a/base")
    assert _load(pool, owner, "a/base") is base
    pool.begin_unloading(base)
    assert owner.held == [True, True, True]
    assert owner.names == {} and pool.find(lambda _: True) is None


def test_a_base_is_forgotten_before_its_engine_ends(
    pool: BasePool, owner: Owner, engines: EngineDoubles, clock: ManualClock
) -> None:
    base = _load(pool, owner, "a/idle")
    engine = engines.started[0]
    clock.advance(IDLE_S)

    def full_until_it_is_gone(device: Device) -> Assessment:
        if engine.ended or device.available_bytes == FREE_BYTES + engine.held_bytes:  # as if it were gone
            return fits(device)
        return Assessment("does_not_fit", device.available_bytes, None)

    pool.join_or_start(base_request("a/next"), full_until_it_is_gone, owner.register)
    assert engine.ended and base.state is LoadState.UNLOADING
    assert owner.engines_at_forgetting == [engine]  # it was still there
    assert list(owner.names) == ["a/next"]


def test_a_base_that_works_is_not_forgotten(pool: BasePool, owner: Owner) -> None:
    base = _load(pool, owner, "a/base")
    base.acquire("training")
    with pytest.raises(ModelBusy):
        pool.begin_unloading(base)
    assert owner.names == {"a/base": base} and pool.find(lambda _: True) is base


@pytest.mark.parametrize("for_client", [True, False])
def test_a_base_that_dies_stays_listed_for_a_client_alone(
    pool: BasePool, owner: Owner, engines: EngineDoubles, for_client: bool
) -> None:
    base = _load(pool, owner, "a/base", for_client=for_client)
    engine = engines.started[0]
    engine.on_exit()
    assert isinstance(base.error, ModelNotReady) and engine.ended
    assert list(owner.names) == ["a/base"] * for_client
    assert pool.find(lambda _: True) is (base if for_client else None)
    assert owner.engines_at_forgetting == [engine] * (not for_client)


def test_what_is_judged_is_judged_alone(pool: BasePool, owner: Owner) -> None:
    second_came, second_judged = threading.Event(), threading.Event()

    def second(device: Device) -> Assessment:
        second_judged.set()
        return fits(device)

    def come() -> None:
        second_came.set()
        pool.admit_run("a run", second, DEVICE, base_request("a/run").key)

    with ThreadPoolExecutor(1) as other:

        def first(device: Device) -> Assessment:
            other.submit(come)
            assert second_came.wait(600)
            assert not second_judged.wait(0.2)
            return fits(device)

        pool.join_or_start(base_request("a/base"), first, owner.register)
        assert second_judged.wait(600)


def test_closing_ends_every_engine_also_of_a_base_that_another_has_replaced(
    pool: BasePool, owner: Owner, engines: EngineDoubles
) -> None:
    dead = _load(pool, owner, "a/base")
    engines.started[0].on_exit()
    assert isinstance(dead.error, ModelNotReady)
    alive = _load(pool, owner, "a/base")
    assert alive is not dead and alive.usable
    pool.close()
    assert len(engines.started) == 2 and engines.alive == []
    assert owner.names == {} and pool.find(lambda _: True) is None


def test_nothing_is_started_once_it_is_closed(pool: BasePool, owner: Owner) -> None:
    pool.close()
    with pytest.raises(EngineUnavailable):
        pool.join_or_start(base_request("a/late"), fits, owner.register)
    assert owner.names == {} and pool.find(lambda _: True) is None
