"""A run that goes on from a checkpoint is, to the bit, the run that never stopped."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.manifest import FolderDamaged
from domain.jobs.figures import TrainingFigures
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.protocol import CheckpointWritten, StepMetrics
from engine.channel import Stopped
from engine.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    RunProgress,
    checkpoint_folders,
    read_checkpoint,
    restore_optimizer,
    split_optimizer,
    step_of,
)
from engine.errors import NotFinite
from engine.training import train
from tests.engine.test_methods import config_for, load
from tests.support.training_command import TestChannel, adapter_bytes, command_for, train_tiny
from tests.support.variants import VARIANTS

# Everything with a state of its own is on: dropout, accumulation over a ragged epoch, warm-up, decay, evaluation.
HARD = {
    "dropout": 0.2,
    "batch_size": 2,
    "gradient_accumulation": 3,
    "max_steps": 9,
    "warmup_ratio": 0.4,
    "scheduler": "cosine",
    "weight_decay": 0.1,
    "learning_rate": 1e-2,
    "eval_every_steps": 2,
}


@pytest.fixture(scope="module")
def whole(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs, one for each configuration."""
    made: dict[str, tuple[TestChannel, TrainingFigures, Path]] = {}

    def run(config: PeftConfig) -> tuple[TestChannel, TrainingFigures, Path]:
        key = config.model_dump_json()
        if key not in made:
            channel, folder = TestChannel(), tmp_path_factory.mktemp("whole")
            made[key] = channel, train_tiny(tiny_path, folder, config, channel), folder
        return made[key]

    return run


def settled(result: TrainingFigures) -> dict[str, Any]:
    """Leave out what differs between any two runs: the time, and what the engine holds."""
    return result.model_dump(exclude={"elapsed_s", "memory_bytes"})


def configs(algorithm: Algorithm) -> PeftConfig:
    no_dropout = {"dropout": 0.0} if algorithm is Algorithm.PISSA else {}
    return config_for(algorithm, **HARD | no_dropout)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_paused_run_goes_on_as_if_it_had_not_been(
    tiny_path: Path, tmp_path: Path, whole: Any, algorithm: Algorithm, packing: bool
) -> None:
    _goes_on(tiny_path, tmp_path, whole, configs(algorithm).model_copy(update={"packing": packing}))


@pytest.mark.parametrize("name", ["pissa nf4", "loftq 3"])
def test_a_run_on_a_rounded_residual_goes_on_too(tiny_path: Path, tmp_path: Path, whole: Any, name: str) -> None:
    algorithm, overrides = VARIANTS[name]
    _goes_on(tiny_path, tmp_path, whole, config_for(algorithm, **HARD | {"dropout": 0.0} | overrides))


def _goes_on(tiny_path: Path, tmp_path: Path, whole: Any, config: PeftConfig) -> None:
    straight, result, folder = whole(config)
    paused = TestChannel(stop_at=straight.looks // 2)
    with pytest.raises(Stopped):
        train_tiny(tiny_path, tmp_path, config, paused)
    assert len(paused.checkpoints()) == 1 and not (tmp_path / "adp").exists()
    resumed = TestChannel()
    again = train_tiny(tiny_path, tmp_path, config, resumed)
    assert resumed.started().resumed_from_step == paused.checkpoints()[0]
    assert paused.losses() | resumed.losses() == straight.losses()
    assert not paused.losses().keys() & resumed.losses().keys()
    assert settled(again) == settled(result)
    assert adapter_bytes(tmp_path) == adapter_bytes(folder)


@settings(max_examples=12)
@given(data=st.data())
def test_any_number_of_stops_anywhere_changes_nothing(
    tiny_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Any, data: st.DataObject
) -> None:
    config = config_for(Algorithm.LORA, **HARD)
    straight, result, folder = whole(config)
    here = tmp_path_factory.mktemp("stopped")
    losses: dict[int, float] = {}
    for stop_at in data.draw(st.lists(st.integers(1, straight.looks), max_size=4)):
        channel = TestChannel(stop_at=stop_at)
        try:
            train_tiny(tiny_path, here, config, channel)
        except Stopped:
            pass
        else:
            shutil.rmtree(here / "adp")  # it ended before the stop: the last step's checkpoint hands it out once more
        losses |= channel.losses()
    channel = TestChannel()
    again = train_tiny(tiny_path, here, config, channel)
    # Only what was trained after the last checkpoint of an unfinished run is repeated, with the same losses.
    assert losses | channel.losses() == straight.losses()
    assert settled(again) == settled(result)
    assert adapter_bytes(here) == adapter_bytes(folder)


def test_checkpoints_by_steps_are_kept_to_their_number_and_size(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=9, checkpoint_every_steps=2, keep_checkpoints=3)
    channel = TestChannel()
    train_tiny(tiny_path, tmp_path, config, channel)
    assert channel.checkpoints() == [2, 4, 6, 8, 9]  # the last step's is always kept
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")] == [
        "step-00000006",
        "step-00000008",
        "step-00000009",
    ]
    train_tiny(tiny_path, tmp_path / "small", config, max_checkpoint_bytes=1)
    assert len(checkpoint_folders(tmp_path / "small" / "checkpoints")) == 1


def test_checkpoints_by_minutes_and_on_demand(tiny_path: Path, tmp_path: Path) -> None:
    timed = TestChannel()
    train_tiny(
        tiny_path, tmp_path / "timed", config_for(Algorithm.LORA, max_steps=3, checkpoint_every_minutes=1e-9), timed
    )
    assert timed.checkpoints() == [1, 2, 3]
    asked = TestChannel()
    asked.checkpoint_wanted = lambda: len(asked.losses()) == 2
    train_tiny(tiny_path, tmp_path / "asked", config_for(Algorithm.LORA, max_steps=3), asked)
    assert asked.checkpoints() == [2, 3]


FILES = ["adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    tiny_path: Path, tmp_path: Path, whole: Any, name: str, damage: str
) -> None:
    settings_ = {**HARD, "checkpoint_every_steps": 2, "keep_checkpoints": 3}
    config = config_for(Algorithm.LORA, **settings_)
    _, result, folder = whole(config)
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints/step-00000009")  # of the end
    newest = tmp_path / "checkpoints" / "step-00000008"
    content = (newest / name).read_bytes()
    middle = len(content) // 2
    damaged = {
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:middle],
        "emptied": b"",
    }
    if damage == "gone":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(damaged[damage])
    with pytest.raises(FolderDamaged):
        read_checkpoint(newest)
    channel = TestChannel()
    again = train_tiny(tiny_path, tmp_path, config, channel)
    assert channel.started().resumed_from_step == 6
    (said,) = channel.started().skipped_checkpoints
    assert said.startswith("step-00000008: ") and (name in said or damage == "gone")
    assert settled(again) == settled(result)
    assert adapter_bytes(tmp_path) == adapter_bytes(folder)


def test_nothing_in_a_checkpoint_can_run_code(tiny_path: Path, tmp_path: Path) -> None:
    train_tiny(tiny_path, tmp_path, config_for(Algorithm.LORA, max_steps=2, checkpoint_every_steps=1))
    *_, folder = checkpoint_folders(tmp_path / "checkpoints")
    for path in folder.iterdir():
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())
    (folder / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(FolderDamaged, match=r"optimizer\.pt does not belong there"):
        read_checkpoint(folder)


def test_keeping_what_there_is_hands_out_the_adapter_of_the_last_step(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA, **{**HARD, "eval_every_steps": None})
    channel = TestChannel(stop_at=20, mode="keep")
    result = train_tiny(tiny_path, tmp_path, config, channel, validation_fraction=0.0)
    steps = max(channel.losses())
    assert result.stopped_on_request and (result.steps, result.adapter_step) == (steps, steps) and steps < 9
    assert adapter_bytes(tmp_path) != b""
    straight = TestChannel()
    train_tiny(tiny_path, tmp_path / "straight", config, straight, validation_fraction=0.0)
    assert channel.losses() == {step: loss for step, loss in straight.losses().items() if step <= steps}


def test_early_stopping_hands_out_the_best_evaluation_across_a_pause(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(
        Algorithm.LORA,
        max_steps=40,
        eval_every_steps=1,
        early_stopping_patience=3,
        learning_rate=0.05,
        scheduler="constant",
    )
    straight = TestChannel()
    result = train_tiny(tiny_path, tmp_path / "straight", config, straight)
    assert result.stopped_early and result.adapter_step == result.steps - 3
    assert result.best_eval_loss is not None and result.final_eval_loss is not None
    assert result.best_eval_loss < result.final_eval_loss
    # Pause in the last step before the end: the best parameters are then older than the checkpoint's own.
    with pytest.raises(Stopped):
        train_tiny(tiny_path, tmp_path / "paused", config, TestChannel(stop_at=straight.looks - 1))
    again = train_tiny(tiny_path, tmp_path / "paused", config)
    assert settled(again) == settled(result)
    assert adapter_bytes(tmp_path / "paused") == adapter_bytes(tmp_path / "straight")


def test_a_loss_that_is_not_finite_leaves_the_last_finite_checkpoint(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=9, checkpoint_every_steps=1, keep_checkpoints=9)
    base = load(tiny_path, config)

    class Poisoning(TestChannel):
        def emit(self, event: Any) -> None:
            super().emit(event)
            if isinstance(event, CheckpointWritten) and event.step == 4:
                with torch.no_grad():
                    next(p for p in base.model.parameters() if p.requires_grad).fill_(float("nan"))

    channel = Poisoning()
    with pytest.raises(NotFinite, match=r"the loss of step 5 is not finite; its rows are \[\d+"):
        train(base, command_for(tmp_path, config), channel)
    folders = checkpoint_folders(tmp_path / "checkpoints")
    assert [step_of(folder) for folder in folders] == [1, 2, 3, 4]
    for folder in folders:
        assert all(tensor.isfinite().all() for tensor in read_checkpoint(folder).adapter.values())
    assert base.adapters == []


def test_the_8_bit_optimizers_state_survives_a_checkpoint(tmp_path: Path) -> None:
    """bitsandbytes nests its quantised tensors; its step runs on a CPU too."""
    optimizers = importlib.import_module("bitsandbytes.optim")

    def trained(steps: int, resume: Checkpoint | None = None) -> tuple[torch.Tensor, Checkpoint]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
        optimizer = optimizers.AdamW8bit([parameter], lr=1e-2)
        if resume is not None:
            parameter.data.copy_(resume.adapter["p"])
            restore_optimizer(optimizer, resume.optimizer, resume.settings["optimizer"])
        done = 0 if resume is None else resume.progress.step
        for step in range(done, steps):
            parameter.grad = torch.sin(torch.arange(8192) * (step + 1.0))
            optimizer.step()
        tensors, plain = split_optimizer(optimizer)
        progress = RunProgress(step=steps)
        return parameter.data, Checkpoint(progress, {"p": parameter.data}, tensors, {}, {"optimizer": plain})

    straight, _ = trained(6)
    _, half = trained(3)
    assert any(tensor.dtype == torch.uint8 for tensor in half.optimizer.values())
    folder = CheckpointFolder(tmp_path, 2, None, {}).write(half)
    resumed, _ = trained(6, read_checkpoint(folder))
    assert torch.equal(resumed, straight)


def test_a_run_that_goes_on_does_not_write_its_checkpoint_again(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=9, checkpoint_every_steps=4)
    with pytest.raises(Stopped):
        train_tiny(tiny_path, tmp_path, config, TestChannel(stop_at=10))
    at = [step_of(path) for path in checkpoint_folders(tmp_path / "checkpoints")][-1]
    again = TestChannel()
    train_tiny(tiny_path, tmp_path, config, again)
    assert again.started().resumed_from_step == at and at not in again.checkpoints()


def test_steps_that_a_run_abandoned_do_not_push_out_what_it_writes(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, 2, None, {})
    for step in (40, 50):
        damaged = store.write(Checkpoint(RunProgress(step=step), {"p": torch.zeros(1)}, {}, {}, {}))
        (damaged / "state.json").write_text("")
    assert store.newest(100, lambda *_: None) is None
    store.write(Checkpoint(RunProgress(step=10), {"p": torch.zeros(1)}, {}, {}, {}))
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [10]


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, 2, None, {})
    written = store.write(Checkpoint(RunProgress(step=3), {"p": torch.zeros(1)}, {}, {}, {}))
    written.rename(tmp_path / f".{written.name}.old.tmp")  # as a kill between the two renames leaves it
    found = store.newest(100, lambda *_: None)
    assert found is not None and found.progress.step == 3


@pytest.mark.parametrize(("before", "after"), [(3, None), (None, 3)])
def test_early_stopping_switched_on_or_off_in_between_hands_out_what_it_says(
    tiny_path: Path, tmp_path: Path, before: int | None, after: int | None
) -> None:
    common = {"max_steps": 12, "eval_every_steps": 1, "learning_rate": 0.05, "scheduler": "constant"}
    first = config_for(Algorithm.LORA, **common, early_stopping_patience=before)
    with pytest.raises(Stopped):
        train_tiny(tiny_path, tmp_path, first, TestChannel(stop_at=20))
    result = train_tiny(tiny_path, tmp_path, first.model_copy(update={"early_stopping_patience": after}))
    if after is None:
        assert result.adapter_step == result.steps == 12
    else:
        evaluated_since = result.steps if result.stopped_early else 12
        assert result.best_eval_loss is not None and result.adapter_step <= evaluated_since
        assert result.adapter_step > step_of(checkpoint_folders(tmp_path / "checkpoints")[0])


def test_an_evaluation_that_is_not_finite_ends_the_run(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=9, eval_every_steps=1)
    base = load(tiny_path, config)

    class Poisoning(TestChannel):
        def emit(self, event: Any) -> None:
            super().emit(event)
            if isinstance(event, StepMetrics) and event.step == 2:
                with torch.no_grad():
                    next(p for p in base.model.parameters() if p.requires_grad).fill_(float("nan"))

    channel = Poisoning()
    with pytest.raises(NotFinite, match="evaluation loss after step 2 is not finite"):
        train(base, command_for(tmp_path, config), channel)
