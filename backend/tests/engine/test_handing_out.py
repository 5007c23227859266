"""Nothing that fails after the last step loses the training, and most of it fails before the first one."""

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from core.errors import StorageFull
from core.manifest import verify, write_manifest
from domain.peft.algorithms import Algorithm
from domain.protocol import StepMetrics, TrainingStarted
from engine import handing_out, methods
from engine.base import Base
from engine.checkpoints import CheckpointFolder, checkpoint_folders, step_of
from engine.errors import CannotSave
from engine.tokenizer_folder import save_tokenizer
from engine.trainer import Trainer
from engine.training import train
from tests.engine.test_methods import config_for, load
from tests.support.training_command import TestChannel, adapter_bytes, command_for, train_tiny

SETTINGS = {"max_steps": 3, "learning_rate": 1e-2, "dropout": 0.1}
AFTER = {
    "the adapter's tensors": (methods, "adapter_state"),
    "the weights' file": (handing_out, "save_file"),
    "PEFT's config": (LoraConfig, "save_pretrained"),
    "the tokenizer": (handing_out, "save_tokenizer"),
    "the card": (handing_out, "finish_card"),
    "the model card": (handing_out, "readme"),
    "the manifest": (handing_out, "write_manifest"),
    "the adapter on the base": (Base, "attach"),
    "the last evaluation": (Trainer, "_evaluate"),
    "the end of the fast path": (Trainer, "_end"),
}

ERRORS = (IsADirectoryError("x"), MemoryError("x"), ValueError("x"))


class Breaks:
    """Fails as soon as the last step is taken, or before the first."""

    def __init__(self, real: Callable[..., Any], broken: Callable[[], bool], error: Exception) -> None:
        self._real, self._broken, self._error = real, broken, error

    def __get__(self, instance: Any, _owner: Any) -> Callable[..., Any]:
        return (lambda *args, **named: self(instance, *args, **named)) if instance is not None else self

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self._broken():
            raise self._error
        return self._real(*args, **named)


def last_step_taken(channel: TestChannel) -> Callable[[], bool]:
    return lambda: any(isinstance(event, StepMetrics) and event.step == 3 for event in channel.events)


@pytest.mark.parametrize(("what", "error"), list(zip(AFTER, cycle(ERRORS), strict=False)))
def test_what_fails_after_the_last_step_loses_nothing(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception
) -> None:
    config = config_for(Algorithm.LORA, **SETTINGS)
    train_tiny(tiny_path, tmp_path / "straight", config)
    owner, name = AFTER[what]
    channel, base = TestChannel(), load(tiny_path, config)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, Breaks(getattr(owner, name), last_step_taken(channel), error))
        within = what in ("the last evaluation", "the end of the fast path")
        with pytest.raises(type(error) if within else CannotSave) as raised:
            train(base, command_for(tmp_path, config), channel)
    if not within:
        assert "ended after step 3" in str(raised.value) and type(error).__name__ in str(raised.value)
    assert channel.checkpoints() == [3]
    assert not list(tmp_path.glob(".adp*"))
    again = TestChannel()
    result = train(base, command_for(tmp_path, config), again)  # in the same engine
    assert again.started().resumed_from_step == 3 and again.losses() == {}
    assert (result.steps, result.stopped_on_request) == (3, False)
    assert adapter_bytes(tmp_path) == adapter_bytes(tmp_path / "straight")
    assert base.adapters == ["adp"]
    verify(tmp_path / "adp")


@pytest.mark.parametrize("what", [what for what, (owner, _) in AFTER.items() if owner is handing_out])
def test_what_would_fail_then_fails_before_the_first_step(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    owner, name = AFTER[what]
    monkeypatch.setattr(owner, name, Breaks(getattr(owner, name), lambda: True, IsADirectoryError("a folder")))
    channel = TestChannel()
    with pytest.raises(CannotSave, match="0 steps are trained, and its adapter cannot be saved: IsADirectoryError"):
        train_tiny(tiny_path, tmp_path, config_for(Algorithm.LORA, **SETTINGS), channel)
    assert not any(isinstance(event, StepMetrics | TrainingStarted) for event in channel.events)
    assert not list(tmp_path.glob(".adp*")) and not (tmp_path / "adp").exists()


def test_a_checkpoint_is_proved_too(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.checkpoints.write_manifest", Breaks(print, lambda: True, TypeError("not JSON")))
    with pytest.raises(CannotSave, match="TypeError: not JSON"):
        train_tiny(tiny_path, tmp_path, config_for(Algorithm.LORA, **SETTINGS))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_that_has_no_room_for_the_last_checkpoint_may_have_it_for_the_adapter(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CheckpointFolder, "write", Breaks(print, lambda: True, StorageFull("no space")))
    train_tiny(tiny_path, tmp_path, config_for(Algorithm.LORA, **SETTINGS))
    assert adapter_bytes(tmp_path) and "the last step is not kept: no space" in capsys.readouterr().err


def test_an_adapter_that_was_to_be_kept_is_handed_out_without_another_step(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(Algorithm.LORA, **SETTINGS | {"max_steps": 9, "batch_size": 2, "gradient_accumulation": 3})
    straight = TestChannel(stop_at=20, mode="keep")
    expected = train_tiny(tiny_path, tmp_path / "straight", config, straight)
    stopped = TestChannel(stop_at=20, mode="keep")
    with monkeypatch.context() as patched:
        patched.setattr(
            handing_out, "save_tokenizer",
            Breaks(save_tokenizer, lambda: stopped.looks >= 20, OSError("x")),
        )  # fmt: skip
        with pytest.raises(CannotSave):
            train_tiny(tiny_path, tmp_path, config, stopped)
    assert stopped.checkpoints() == [expected.steps]
    channel = TestChannel()
    result = train_tiny(tiny_path, tmp_path, config, channel, hands_out=True)
    assert channel.losses() == {} and 0 < result.steps == expected.steps < 9 and result.stopped_on_request
    assert adapter_bytes(tmp_path) == adapter_bytes(tmp_path / "straight")
    assert json.loads((tmp_path / "adp/training.json").read_text())["outcome"]["stopped_on_request"]


def test_early_stopping_keeps_its_end_and_its_best_too(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 40, "eval_every_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.05}
    config = config_for(Algorithm.LORA, **settings, scheduler="constant")
    expected = train_tiny(tiny_path, tmp_path / "straight", config)
    proofs = iter([False])  # the first time it is written, before the first step
    with monkeypatch.context() as patched:
        broken = Breaks(write_manifest, lambda: next(proofs, True), OSError("x"))
        patched.setattr(handing_out, "write_manifest", broken)
        with pytest.raises(CannotSave):
            train_tiny(tiny_path, tmp_path, config)
    assert step_of(checkpoint_folders(tmp_path / "checkpoints")[-1]) == expected.steps < 40
    channel = TestChannel()
    result = train_tiny(tiny_path, tmp_path, config, channel)
    assert channel.losses() == {} and result.adapter_step == expected.adapter_step
    assert adapter_bytes(tmp_path) == adapter_bytes(tmp_path / "straight")


@pytest.mark.parametrize("every", [None, 2])
def test_a_run_that_has_ended_can_be_trained_longer(tiny_path: Path, tmp_path: Path, every: int | None) -> None:
    """The end of the shorter run is evaluated there alone: the longer one is as if it had been that from the start."""
    settings = {**SETTINGS, "scheduler": "constant", "eval_every_steps": every}
    settings["early_stopping_patience"] = 9 if every else None
    straight, first, second = TestChannel(), TestChannel(), TestChannel()
    longer = config_for(Algorithm.LORA, **settings | {"max_steps": 6})
    expected = train_tiny(tiny_path, tmp_path / "straight", longer, straight)
    train_tiny(tiny_path, tmp_path, config_for(Algorithm.LORA, **settings), first)
    result = train_tiny(tiny_path, tmp_path, longer, second)
    assert second.started().resumed_from_step == 3
    assert first.losses() | second.losses() == straight.losses()
    assert adapter_bytes(tmp_path) == adapter_bytes(tmp_path / "straight")
    assert result.best_eval_loss == expected.best_eval_loss
