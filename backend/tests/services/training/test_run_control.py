"""How a run is stopped: the strongest reason wins, and no engine begins after it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.protocol import Command, E, PrepareGguf, R, StopMode
from services.engines.process import EngineProcess
from services.training.run_control import Ending, RunControl, RunStopped

WEAKEST_FIRST: tuple[Ending, ...] = (
    "not_saved",
    "server_ends",
    "pause",
    "keep_adapter",
    "keep_checkpoints",
    "discard",
)
# Any command will do: the control looks at its id alone.
COMMAND = PrepareGguf(request_id="request-1", gguf_path="a", output_path="b", model_id="a/b")


class Engine(EngineProcess):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def request(self, command: Command[R, E], on_event: Callable[[E], None] | None = None) -> "Future[R]":
        self.told.append(("begin", command.request_id))
        return Future()

    def stop(self, request_id: str, mode: StopMode = "discard") -> None:
        self.told.append((request_id, mode))

    def write_checkpoint(self, request_id: str) -> None:
        self.told.append((request_id, "checkpoint"))


def begin(control: RunControl) -> Engine:
    engine = Engine()
    control.request(engine, COMMAND, lambda _event: None)
    return engine


def test_every_ending_has_its_rank() -> None:
    assert set(WEAKEST_FIRST) == set(get_args(Ending))


@given(st.lists(st.sampled_from(WEAKEST_FIRST), min_size=1, max_size=6))
def test_the_strongest_ending_wins_in_whichever_order_they_come(endings: list[Ending]) -> None:
    control = RunControl(threading.RLock())
    for ending in endings:
        control.set(ending)
    assert control.stopped and control.ending == max(endings, key=WEAKEST_FIRST.index)


@pytest.mark.parametrize(
    ("ending", "mode"),
    [
        ("discard", "discard"),
        ("keep_adapter", "keep"),
        ("keep_checkpoints", "pause"),
        ("pause", "pause"),
        ("server_ends", "pause"),
        ("not_saved", "pause"),
    ],
)
def test_the_engine_is_told_how_to_end_and_only_once_it_works(ending: Ending, mode: str) -> None:
    control = RunControl(threading.RLock())
    control.tell_engine()
    assert not control.write_checkpoint()
    engine = begin(control)
    assert control.write_checkpoint()
    control.set(ending)
    control.tell_engine()
    assert engine.told == [("begin", "request-1"), ("request-1", "checkpoint"), ("request-1", mode)]


def test_no_engine_begins_once_the_run_is_to_end() -> None:
    control = RunControl(threading.RLock())
    control.set("pause")
    engine = Engine()
    for act in (control.check, control.wait, lambda: control.request(engine, COMMAND, lambda _event: None)):
        with pytest.raises(RunStopped):
            act()
    assert engine.told == []


def test_a_stop_that_races_with_the_command_is_never_lost() -> None:
    with ThreadPoolExecutor(1) as other:
        for _ in range(300):
            control, engine, together = RunControl(threading.RLock()), Engine(), threading.Barrier(2)

            def stop(control: RunControl = control, together: threading.Barrier = together) -> None:
                together.wait(600)
                control.set("discard")
                control.tell_engine()

            stopping = other.submit(stop)
            together.wait(600)
            with suppress(RunStopped):
                control.request(engine, COMMAND, lambda _event: None)
            stopping.result(600)
            assert engine.told in ([], [("begin", "request-1"), ("request-1", "discard")])
