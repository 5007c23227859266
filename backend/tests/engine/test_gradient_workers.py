"""One run over several processes: the loss curve of one, exact resume, and workers that fail."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from domain.peft.algorithms import Algorithm
from domain.protocol import Computing, Evaluated, StepMetrics
from engine.channel import Stopped
from engine.errors import BadModel, WorkerDied
from tests.engine.test_methods import config_for
from tests.support.training_command import TestChannel, adapter_bytes, train_tiny

STEPS = {
    "batch_size": 2,
    "gradient_accumulation": 3,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "eval_every_steps": 2,
}
TWO = {"workers": ["cpu"]}


def evaluations(channel: TestChannel) -> list[float]:
    return [event.eval_loss for event in channel.events if isinstance(event, Evaluated)]


def worker_processes() -> list[psutil.Process]:
    own = psutil.Process().children(recursive=True)
    return [child for child in own if "engine.gradient_worker" in child.cmdline()]


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (Algorithm.LORA, {}),
        pytest.param(Algorithm.LORA, {"packing": True, "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(Algorithm.QLORA, {}, marks=pytest.mark.slow),
        pytest.param(Algorithm.DORA, {}, marks=pytest.mark.slow),
        pytest.param(Algorithm.PISSA, {}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, settings: dict[str, Any]
) -> None:
    config = config_for(algorithm, dropout=0.0, **STEPS, **settings)
    alone, together = TestChannel(), TestChannel()
    train_tiny(tiny_path, tmp_path / "alone", config, alone)
    train_tiny(tiny_path, tmp_path / "together", config, together, **TWO)
    assert together.losses() == pytest.approx(alone.losses(), rel=1e-5)
    assert evaluations(together) == pytest.approx(evaluations(alone), rel=1e-5)
    assert len(together.losses()) == 4
    (computing,) = [event for event in together.events if isinstance(event, Computing)]
    assert computing.how.endswith("the passes of each step are dealt to 2 devices")
    assert worker_processes() == []


RANDOM = config_for(Algorithm.LORA, dropout=0.3, neftune_noise_alpha=5.0, **STEPS)


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_the_random_numbers(tiny_path: Path, tmp_path: Path) -> None:
    """Dropout and noise are drawn for each pass by its place in the step, whichever process computes it."""
    two, three = TestChannel(), TestChannel()
    train_tiny(tiny_path, tmp_path / "two", RANDOM, two, **TWO)
    train_tiny(tiny_path, tmp_path / "three", RANDOM, three, workers=["cpu", "cpu"])
    assert three.losses() == pytest.approx(two.losses(), rel=1e-5)


def test_a_run_over_two_processes_resumes_to_the_bit(tiny_path: Path, tmp_path: Path) -> None:
    whole = TestChannel()
    train_tiny(tiny_path, tmp_path / "whole", RANDOM, whole, **TWO)
    first, second = TestChannel(), TestChannel()
    with pytest.raises(Stopped):
        train_tiny(tiny_path, tmp_path / "cut", RANDOM, StoppingAfter(first, 2), **TWO)
    assert worker_processes() == []
    train_tiny(tiny_path, tmp_path / "cut", RANDOM, second, **TWO)
    assert first.losses() | second.losses() == whole.losses()
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["cpu"], []),
        pytest.param([], ["cpu"], marks=pytest.mark.slow),
        pytest.param(["cpu"], ["cpu", "cpu"], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(
    tiny_path: Path, tmp_path: Path, before: list[str], after: list[str]
) -> None:
    config = config_for(Algorithm.LORA, dropout=0.0, **STEPS)
    whole, first, second = TestChannel(), TestChannel(), TestChannel()
    train_tiny(tiny_path, tmp_path / "whole", config, whole)
    with pytest.raises(Stopped):
        train_tiny(tiny_path, tmp_path / "cut", config, StoppingAfter(first, 2), workers=before)
    train_tiny(tiny_path, tmp_path / "cut", config, second, workers=after)
    assert second.started().resumed_from_step == 2
    assert first.losses() | second.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_a_killed_worker_ends_the_run_and_the_next_one_goes_on(tiny_path: Path, tmp_path: Path) -> None:
    config = RANDOM.model_copy(update={"checkpoint_every_steps": 1})
    whole, first, second = TestChannel(), KillsAWorker(after_step=2), TestChannel()
    train_tiny(tiny_path, tmp_path / "whole", config, whole, **TWO)
    with pytest.raises(WorkerDied, match="ended by signal 9"):
        train_tiny(tiny_path, tmp_path / "cut", config, first, **TWO)
    assert worker_processes() == []
    train_tiny(tiny_path, tmp_path / "cut", config, second, **TWO)
    # The worker died in the evaluation after step 2, before the checkpoint of that step.
    assert second.started().resumed_from_step == 1
    assert first.losses() | second.losses() == whole.losses()


def test_a_stop_is_heard_while_a_worker_computes(tiny_path: Path, tmp_path: Path) -> None:
    """The worker is halted in the middle of its share, so that only the stop can end the wait for it."""
    channel = HaltsAWorker(after_step=2)
    with pytest.raises(Stopped):
        train_tiny(tiny_path, tmp_path, RANDOM, channel, **TWO)
    assert channel.checkpoints() == [2]
    assert worker_processes() == []


def test_an_error_of_a_worker_is_the_error_of_the_run(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker cannot load the base, which is broken meanwhile."""
    from engine.training import train
    from tests.engine.test_methods import load
    from tests.support.training_command import command_for

    base = load(tiny_path, RANDOM)
    base.path = tmp_path / "nothing"
    with pytest.raises(BadModel, match="on cpu: nothing cannot be loaded"):
        train(base, command_for(tmp_path / "run", RANDOM, workers=["cpu"]), TestChannel())
    assert worker_processes() == []


class StoppingAfter(TestChannel):
    """Pauses the run after a step, and collects the events in another channel."""

    def __init__(self, into: TestChannel, step: int) -> None:
        super().__init__()
        self.events, self._step = into.events, step

    def check_stop(self, request_id: str) -> None:
        if len(self.losses()) >= self._step:
            raise Stopped("pause")


class KillsAWorker(TestChannel):
    def __init__(self, after_step: int) -> None:
        super().__init__()
        self._step, self._done = after_step, False

    def signal_worker(self, number: signal.Signals) -> None:
        (worker,) = worker_processes()
        os.kill(worker.pid, number)

    def emit(self, event: Any) -> None:
        super().emit(event)
        if isinstance(event, StepMetrics) and event.step == self._step and not self._done:
            self._done = True
            self.on_step()

    def on_step(self) -> None:
        self.signal_worker(signal.SIGKILL)


class HaltsAWorker(KillsAWorker):
    def on_step(self) -> None:
        self.signal_worker(signal.SIGSTOP)
        self._looks_at_halt = self.looks

    def check_stop(self, request_id: str) -> None:
        self.looks += 1
        # The engine's own share of the next step looks twice, an evaluation's once: later looks are those of the wait.
        if self._done and self.looks > self._looks_at_halt + 6:
            raise Stopped("pause")
