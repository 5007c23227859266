"""Run the engine's `train` command inside the test, on a channel that the test holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from domain.jobs.figures import TrainingFigures
from domain.peft.config import PeftConfig
from domain.protocol import CheckpointWritten, StepMetrics, StopMode, Train, TrainingStarted
from engine.channel import Channel, Stopped
from engine.training import train
from tests.engine.test_methods import load
from tests.support.channel_double import RecordingChannel
from tests.support.rows import messages_jsonl
from tests.support.tiny_model import TINY_ID


class TestChannel(RecordingChannel):
    """Collects the events, and stops the run at its `stop_at`-th look for a stop, counted from 1."""

    __test__ = False

    def __init__(self, stop_at: int | None = None, mode: StopMode = "pause") -> None:
        super().__init__()
        self.looks = 0
        self._stop_at, self._mode = stop_at, mode
        self.checkpoint_wanted: Callable[[], bool] = lambda: False

    def check_stop(self, request_id: str) -> None:
        self.looks += 1
        if self.looks == self._stop_at:
            raise Stopped(self._mode)

    def take_checkpoint_request(self, request_id: str) -> bool:
        return self.checkpoint_wanted()

    def losses(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.events if isinstance(event, StepMetrics)}

    def checkpoints(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, CheckpointWritten)]

    def started(self) -> TrainingStarted:
        (event,) = [event for event in self.events if isinstance(event, TrainingStarted)]
        return event


def command_for(folder: Path, config: PeftConfig, **changes: Any) -> Train:
    """Return a command over the usual rows, with everything below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text(messages_jsonl())
    values = {
        "request_id": "r",
        "adapter_id": "adp",
        "config": config,
        "dataset_path": str(folder / "rows.jsonl"),
        "validation_path": None,
        "validation_fraction": 0.2,
        "output_path": str(folder / "adp"),
        "base_model_id": TINY_ID,
        "base_revision": None,
        "checkpoints_path": str(folder / "checkpoints"),
        "max_checkpoint_bytes": None,
        "recorded_step": 10**9,
        "about": None,
    }
    return Train(**values | changes)


def train_tiny(
    tiny_path: Path, folder: Path, config: PeftConfig, channel: Channel | None = None, **changes: Any
) -> TrainingFigures:
    """Train on a freshly loaded base, as an engine that has just started does."""
    return train(load(tiny_path, config), command_for(folder, config, **changes), channel or TestChannel())


def adapter_bytes(folder: Path) -> bytes:
    """Return the weights that were handed out."""
    return (folder / "adp" / "adapter_model.safetensors").read_bytes()
