"""A run that goes on with other settings has them from its first step on."""

from pathlib import Path
from typing import Any

import pytest

from domain.peft.algorithms import Algorithm
from domain.protocol import AboutDataset, AboutRun, StepMetrics, TrainingBuilt
from tests.engine.test_methods import config_for
from tests.support.training_command import TestChannel, train_tiny

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "warmup_ratio": 0.3, "checkpoint_every_steps": 2, "keep_checkpoints": 9,
}  # fmt: skip


def rates(channel: TestChannel) -> dict[int, float]:
    return {event.step: event.learning_rate for event in channel.events if isinstance(event, StepMetrics)}


@pytest.mark.parametrize(
    ("algorithm", "settings", "first", "second"),
    [
        (Algorithm.LORA, {"scheduler": "linear"}, 4, 9),
        (Algorithm.LORA, {"scheduler": "linear"}, 9, 5),
        (Algorithm.LORA, {"scheduler": "cosine", "min_learning_rate_ratio": 0.1}, 4, 9),
        (Algorithm.LORA_PLUS, {"scheduler": "cosine", "lora_plus_ratio": 4.0}, 4, 9),
    ],
)
def test_the_rate_is_that_of_the_new_schedule_at_once(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, settings: dict[str, Any], first: int, second: int
) -> None:
    channels = [TestChannel(), TestChannel(), TestChannel()]
    configs = [config_for(algorithm, **SETTINGS | settings, max_steps=steps) for steps in (first, second)]
    train_tiny(tiny_path, tmp_path / "straight", configs[1], channels[0])
    train_tiny(tiny_path, tmp_path, configs[0], channels[1])
    for newer in (tmp_path / "checkpoints").glob("step-*"):
        if int(newer.name[-2:]) > 4:  # both go on from the same step
            newer.rename(tmp_path / newer.name)
    train_tiny(tiny_path, tmp_path, configs[1], channels[2])
    assert channels[2].started().resumed_from_step == 4
    assert rates(channels[2]) == {step: rate for step, rate in rates(channels[0]).items() if step > 4}


def test_every_other_setting_of_the_optimizer_is_the_new_runs(tiny_path: Path, tmp_path: Path) -> None:
    before = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_epsilon": 1e-8}
    after = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6}
    train_tiny(tiny_path, tmp_path, config_for(Algorithm.LORA, **SETTINGS | before, max_steps=3))
    channel = TestChannel()
    train_tiny(tiny_path, tmp_path, config_for(Algorithm.LORA, **SETTINGS | after, max_steps=5), channel)
    (built,) = [event for event in channel.events if isinstance(event, TrainingBuilt)]
    (group,) = built.groups
    assert (group.weight_decay, group.betas[0], group.epsilon, group.learning_rate) == (0.1, 0.8, 1e-6, 1e-3)


def test_a_run_that_stopped_early_has_its_patience_anew_in_another_job(tiny_path: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 40, "eval_every_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.5}
    config = config_for(Algorithm.LORA, **settings)
    first = train_tiny(tiny_path, tmp_path, config)
    assert first.stopped_early
    # The job's own checkpoint of its end is handed out, with no step more.
    assert train_tiny(tiny_path, tmp_path, config).steps == first.steps
    data = AboutDataset(name="d", format="messages", rows=1, sha256="0", settings={})
    about = AboutRun(
        name="n", job_id="j", algorithm="lora", resumed_from=f"other/step-{first.steps:08d}",
        dataset_sha256="0", dataset=data, validation_dataset=None,
    )  # fmt: skip
    second = train_tiny(tiny_path, tmp_path, config, about=about)
    assert second.steps >= first.steps + 2
    assert second.best_eval_loss is not None and first.best_eval_loss is not None
    assert second.best_eval_loss <= first.best_eval_loss
