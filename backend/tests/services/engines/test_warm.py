"""Engines that are kept ready: which, how many, for whom they give way, and what becomes of those that die."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engines.process import EngineProcess
from services.engines.warm import EngineKind, Engines, HostMemory
from tests.support.engine_double import EngineDouble, EngineDoubles
from tests.support.hub_double import ManualClock
from tests.support.server import wait_until

GIB = 2**30
MIB = 2**20
CPU, DESCRIBES = EngineKind("transformers"), EngineKind("none")
ON_GPU = EngineKind("unsloth", "GPU-1")


class Machine:
    """What the keeper looks at, which tests change.

    `free_bytes` is what is free beside the doubles.
    """

    def __init__(self, doubles: EngineDoubles) -> None:
        self.doubles, self.kinds = doubles, [CPU]
        self.total_bytes, self.free_bytes = 16 * GIB, 12 * GIB
        self.busy = False

    def memory(self) -> HostMemory:
        return HostMemory(self.total_bytes, self.free_bytes - sum(one.held_bytes for one in self.doubles.alive))


@pytest.fixture
def doubles() -> EngineDoubles:
    return EngineDoubles(300 * MIB)


@pytest.fixture
def machine(doubles: EngineDoubles) -> Machine:
    return Machine(doubles)


Make = Callable[..., Engines]


@pytest.fixture
def make(machine: Machine, doubles: EngineDoubles, clock: ManualClock, tmp_path: Path) -> Iterator[Make]:
    made: list[Engines] = []

    def engines(most_bytes: int | None = None, start: Any = doubles) -> Engines:
        made.append(
            Engines(
                clock,
                start,
                lambda: machine.kinds,
                machine.memory,
                log_dir=tmp_path,
                silence_s=60.0,
                most_bytes=most_bytes,
            )
        )
        made[-1].hold_while(lambda: machine.busy)
        return made[-1]

    yield engines
    for one in made:
        one.close()


def settle(engines: Engines) -> float | None:
    """Look as the keeper does, until nothing more is started."""
    while (pause_s := engines._look()) == 0.0:
        pass
    return pause_s


def take(engines: Engines, tmp_path: Path, kind: EngineKind = CPU, **options: Any) -> EngineProcess:
    return engines.take(tmp_path / "taken.log", backend=kind.backend, gpu_uuid=kind.gpu_uuid, **options)


def test_each_kind_is_kept_and_one_that_is_taken_is_replaced(
    make: Make, machine: Machine, doubles: EngineDoubles, tmp_path: Path
) -> None:
    machine.kinds, engines, ended = [ON_GPU, CPU, DESCRIBES], make(), []
    assert settle(engines) is None  # it looks again when one is missing, and not before
    assert [(one.engine, one.gpu_uuid, one.state) for one in engines.standing()] == [
        ("unsloth", "GPU-1", "ready"), ("transformers", None, "ready"), ("none", None, "ready"),
    ]  # fmt: skip
    assert all(one.options["in_background"] for one in doubles.started)
    taken = take(engines, tmp_path, ON_GPU, on_exit=lambda: ended.append(True))
    assert taken is doubles.started[0] and doubles.started[0].log_path == tmp_path / "taken.log"
    assert len(engines.standing()) == 2
    settle(engines)
    assert len(engines.standing()) == 3 and len(doubles.started) == 4
    doubles.started[0].kill()
    assert ended == [True] and len(engines.standing()) == 3  # the end of one that was taken is its owner's alone


def test_another_kind_is_started_anew_and_leaves_those_that_are_kept(
    make: Make, doubles: EngineDoubles, tmp_path: Path
) -> None:
    engines = make()
    settle(engines)
    for kind in (EngineKind("transformers", "GPU-1"), EngineKind("transformers", "GPU-2"), EngineKind("unsloth")):
        new = take(engines, tmp_path, kind)
        assert new is doubles.started[-1] and new.options["gpu_uuid"] == kind.gpu_uuid
        assert "in_background" not in doubles.started[-1].options
    assert len(engines.standing()) == 1


def test_one_that_describes_is_replaced_once_it_has_ended(
    make: Make, machine: Machine, doubles: EngineDoubles, tmp_path: Path
) -> None:
    machine.kinds, engines = [DESCRIBES], make()
    settle(engines)
    taken = take(engines, tmp_path, DESCRIBES)
    settle(engines)
    assert engines.standing() == []
    taken.close()
    settle(engines)
    assert len(engines.standing()) == 1 and len(doubles.started) == 2


def test_a_setting_keeps_none(make: Make, doubles: EngineDoubles, tmp_path: Path) -> None:
    engines = make(0)
    engines.start()
    assert not engines._keeper.is_alive()
    settle(engines)
    assert doubles.started == [] and engines.memory_bytes() == 0
    assert take(engines, tmp_path) is doubles.started[0]


@given(st.integers(0, 4 * GIB), st.integers(2 * GIB, 64 * GIB), st.integers(0, 64 * GIB), st.integers(1, 3 * GIB))
def test_they_never_hold_more_than_they_may(most: int, total: int, free: int, size: int) -> None:
    """Of any size on any machine: what is kept once all are measured fits the setting, and leaves a fifth free."""
    doubles = EngineDoubles(size)
    machine = Machine(doubles)
    machine.kinds = [ON_GPU, CPU, DESCRIBES, EngineKind("transformers", "GPU-1")]
    machine.total_bytes, machine.free_bytes = total, min(free, total)
    engines = Engines(
        ManualClock(), doubles, lambda: machine.kinds, machine.memory,
        log_dir=Path("nowhere"), silence_s=60.0, most_bytes=most or None,
    )  # fmt: skip
    settle(engines)
    held = engines.memory_bytes()
    assert held == sum(one.held_bytes for one in doubles.alive)
    assert held <= (most or total // 10)
    if held:
        assert size <= 2 * GIB and machine.memory().available_bytes >= total // 5
    engines.close()
    assert doubles.alive == []


def test_one_that_grows_too_large_or_holds_a_gpu_is_not_kept(
    make: Make, machine: Machine, doubles: EngineDoubles
) -> None:
    machine.kinds, engines = [ON_GPU, CPU], make(8 * GIB)
    doubles.gpu_contexts = 1
    settle(engines)
    assert engines.standing() == [] and doubles.alive == [] and len(doubles.started) == 2
    settle(engines)
    assert len(doubles.started) == 2  # and none of the kind is tried again


def test_they_give_way_and_come_back_when_there_is_room(
    make: Make, machine: Machine, doubles: EngineDoubles, clock: ManualClock
) -> None:
    machine.kinds, engines = [CPU, DESCRIBES], make()
    settle(engines)
    assert engines.memory_bytes() == 600 * MIB
    assert engines.give_way("a load") and not engines.give_way("a load")
    assert doubles.alive == [] and engines.memory_bytes() == 0
    assert settle(engines) is not None and doubles.alive == []
    clock.advance(60)
    machine.free_bytes = 3 * GIB  # of 16: less than a fifth
    settle(engines)
    assert doubles.alive == []
    machine.free_bytes, machine.busy = 12 * GIB, True
    settle(engines)
    assert doubles.alive == []
    machine.busy = False
    settle(engines)
    assert len(doubles.alive) == 2


def test_one_that_dies_is_started_again_later_each_time(make: Make, doubles: EngineDoubles, clock: ManualClock) -> None:
    engines, waits = make(), []
    settle(engines)
    for _ in range(10):
        doubles.alive[0].kill()
        assert engines.standing() == []
        waited = 0.0
        while settle(engines) is not None:
            clock.advance(5)
            waited += 5
        waits.append(waited)
    assert waits == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    clock.advance(60)
    doubles.alive[0].kill()
    clock.advance(5)
    settle(engines)
    assert len(doubles.alive) == 1  # what ended one that had lived for a minute was not its start


def test_one_that_dies_as_it_is_taken_is_made_good_by_a_new_one(
    make: Make, doubles: EngineDoubles, tmp_path: Path
) -> None:
    engines = make()
    settle(engines)
    doubles.alive[0].ended = True  # its end has not been heard of yet
    taken = take(engines, tmp_path)
    assert taken is doubles.started[1] and taken.alive


def test_one_that_does_not_answer_is_not_given_to_anybody(
    make: Make, doubles: EngineDoubles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.engines.warm._ANSWER_S", 0.01)
    engines = make()
    settle(engines)
    doubles.started[0].takes_long = True
    assert take(engines, tmp_path) is doubles.started[1]
    assert doubles.started[0].ended


def test_one_that_still_imports_is_given_as_it_is(make: Make, doubles: EngineDoubles, tmp_path: Path) -> None:
    doubles.take_long = True
    engines = make()
    keeper = threading.Thread(target=settle, args=(engines,))
    keeper.start()
    wait_until(lambda: bool(engines.standing()))
    assert engines.standing()[0].state == "starting" and engines.growing_bytes() == 100 * MIB
    first: EngineDouble = doubles.started[0]
    doubles.take_long = False
    assert take(engines, tmp_path) is first
    first.answer()
    keeper.join(600)
    assert first.alive and len(engines.standing()) == 1


def test_the_keeper_works_by_itself_and_may_be_begun_twice(make: Make, doubles: EngineDoubles, tmp_path: Path) -> None:
    engines = make()
    engines.start()
    engines.start()
    wait_until(lambda: len(engines.standing()) == 1)
    take(engines, tmp_path)
    wait_until(lambda: len(engines.standing()) == 1)
    assert len(doubles.started) == 2
    engines.close()
    engines.start()
    assert not engines._keeper.is_alive() and len(doubles.alive) == 1  # the one that was taken


def test_closing_ends_them_while_they_import_too(make: Make, doubles: EngineDoubles) -> None:
    doubles.take_long = True
    engines = make()
    keeper = threading.Thread(target=settle, args=(engines,))
    keeper.start()
    wait_until(lambda: bool(engines.standing()))
    engines.close()
    keeper.join(600)
    assert not keeper.is_alive() and doubles.alive == []


def test_the_engine_of_a_gpu_that_has_gone_is_ended(make: Make, machine: Machine, doubles: EngineDoubles) -> None:
    machine.kinds, engines = [ON_GPU, CPU], make()
    settle(engines)
    machine.kinds = [CPU]
    settle(engines)
    assert [one.engine for one in engines.standing()] == ["transformers"] and len(doubles.alive) == 1
