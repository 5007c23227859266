"""Runs that continue an adapter: SFT then SFT, SFT then preferences, with the adapter as it was as the reference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from domain.configure import configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig, recorded
from domain.peft.initial_adapter import InitialAdapter, read_initial_adapter
from domain.peft.objectives import Objective
from engine.base import Base
from engine.batches import Batch, epoch_batches, grouping_of
from engine.channel import Stopped
from engine.errors import BadSetting
from engine.examples import teaches
from engine.initialisation import create_adapter
from engine.objectives import Size, objective_of
from engine.rows import Row, RowStore
from tests.engine.test_methods import CPU, config_for, load, logits
from tests.engine.test_objectives import StopsAfter, examples_of, sequence_log_probability, train
from tests.support.training_command import TestChannel, adapter_bytes, train_tiny
from tests.support.variants import VARIANTS


def one_batch(base: Base, config: PeftConfig) -> tuple[list[list[Row]], Batch]:
    """Return the examples that teach something, and all of them as one batch."""
    examples = [example for example in examples_of(base, config) if teaches(example)]
    rows = RowStore(row for example in examples for row in example)
    (batch,) = epoch_batches(rows, grouping_of(config, 0), seed=1, epoch=0)
    return examples, batch


STEPS: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "warmup_ratio": 0.0, "rank": 4, "max_seq_length": 64}


def first_run(tiny_path: Path, folder: Path, config: PeftConfig) -> InitialAdapter:
    """Train an adapter on answers; return what it decides of the next run."""
    train_tiny(tiny_path, folder, config, validation_fraction=0.0)
    stored = json.loads((folder / "adp" / "adapter_config.json").read_text())
    named = Algorithm.QLORA if config.quantization == "nf4" else Algorithm.LORA
    return read_initial_adapter("adp_one", "tests/tiny", None, named, stored, config)


def next_config(initial: InitialAdapter, **overrides: Any) -> PeftConfig:
    own = {name: value for name, value in STEPS.items() if name != "rank"} | {"dropout": 0.0, "batch_size": 4}
    return configure(initial.algorithm, use_case=None, overrides=own | overrides, machine=CPU, initial=initial).config


@pytest.fixture(scope="module")
def learned(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[InitialAdapter, Path]:
    folder = tmp_path_factory.mktemp("first")
    return first_run(tiny_path, folder, config_for(Algorithm.LORA, **STEPS)), folder / "adp"


@pytest.mark.parametrize(
    "variant",
    [
        "lora",
        "qlora",
        "dora nf4 rslora",
        "rslora",
        "lora-plus",
        "pissa",
        "pissa nf4 rslora",
        "olora",
        "loftq",
        "loftq 3",
    ],
)
def test_a_run_begins_with_what_was_handed_out(tiny_path: Path, tmp_path: Path, variant: str) -> None:
    """Those that change the base hand out twice the rank on the published weights, and are continued as that."""
    algorithm, settings = VARIANTS[variant]
    first = config_for(algorithm, **STEPS | settings)
    initial = first_run(tiny_path, tmp_path, first)
    config = next_config(initial)
    base = load(tiny_path, config)
    base.attach("served", tmp_path / "adp")
    with base.using("served"):
        wanted = logits(base)
    base.detach("served")
    create_adapter(base, "new", config, "tests/tiny", None, continues=tmp_path / "adp")
    base.model.eval()
    assert torch.equal(logits(base), wanted)
    doubled = 2 if config.rank != first.rank else 1
    assert (config.rank, config.alpha) == (doubled * first.rank, doubled * first.alpha)
    assert (config.use_dora, config.use_rslora, config.quantization) == (
        first.use_dora, first.use_rslora, first.quantization,
    )  # fmt: skip
    assert all(p.requires_grad for p in base.trained.values()) and config.init_weights == "adapter"


def test_answers_are_learned_on_from_where_the_first_run_ended(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path]
) -> None:
    """Two steps of four rows see the whole of what two steps more would: the loss goes on, and does not begin anew."""
    initial, folder = learned
    anew, on = TestChannel(), TestChannel()
    settings: dict[str, Any] = {"validation_fraction": 0.0}
    config = next_config(initial, batch_size=24, max_steps=1)
    fresh = config_for(Algorithm.LORA, **STEPS | {"batch_size": 24, "max_steps": 1})
    train_tiny(tiny_path, tmp_path / "anew", fresh, anew, **settings)
    train_tiny(tiny_path, tmp_path / "on", config, on, initial_adapter_path=str(folder), **settings)
    assert on.losses()[1] < anew.losses()[1]


@pytest.mark.parametrize(("objective", "algorithm"), [("dpo", "lora"), ("kto", "lora"), ("dpo", "dora")])
def test_preferences_are_compared_with_the_adapter_as_it_was(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path], objective: Objective, algorithm: str
) -> None:
    initial, folder = learned
    if algorithm == "dora":
        initial = first_run(tiny_path, tmp_path, config_for(Algorithm.DORA, **STEPS))
        folder = tmp_path / "adp"
    config = next_config(initial, objective=objective, batch_size=16)
    base, frozen = load(tiny_path, config), load(tiny_path, config)
    create_adapter(base, "new", config, "tests/tiny", None, continues=folder)
    base.model.eval()
    frozen.attach("served", folder)
    frozen.model.eval()
    minimised = objective_of(base, config)
    with torch.no_grad():
        for parameter in base.trained.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    examples, batch = one_batch(base, config)
    found = float(minimised(batch, Size.of([batch])).loss.detach())
    beta = config.preference_beta or 0.0
    with torch.no_grad():
        gains = [
            [
                sequence_log_probability(base.model, row)[0] - sequence_log_probability(frozen.model, row)[0]
                for row in one
            ]
            for one in examples
        ]
    if objective == "dpo":
        wanted = [-torch.nn.functional.logsigmoid(beta * (better - worse)) for better, worse in gains]
        assert found == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-4)
    moved = sum(abs(float(gain)) for one in gains for gain in one)
    assert moved > 0.1 and not math.isclose(found, math.log(2) if objective == "dpo" else 0.5, rel_tol=1e-4)


def test_at_the_first_step_the_model_is_what_it_is_compared_with(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path]
) -> None:
    initial, folder = learned
    for objective, first in (("dpo", math.log(2)), ("kto", 0.5)):
        config = next_config(initial, objective=objective, max_steps=1)
        channel = train(tiny_path, tmp_path / objective, config, initial_adapter_path=str(folder))
        assert channel.losses()[1] == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_a_continued_run_resumes_to_the_bit(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path], objective: Objective
) -> None:
    """The reference is the adapter that the run began with, also after a checkpoint of another state is read."""
    initial, folder = learned
    settings = {"objective": objective} if objective != "sft" else {}
    config = next_config(initial, dropout=0.1, max_steps=3, **settings)
    more: dict[str, Any] = {"initial_adapter_path": str(folder), "validation_fraction": 0.0}

    def run(name: str, channel: TestChannel) -> TestChannel:
        if objective == "sft":
            train_tiny(tiny_path, tmp_path / name, config, channel, **more)
            return channel
        return train(tiny_path, tmp_path / name, config, channel, **more)

    whole, cut = run("whole", TestChannel()), StopsAfter(2)
    with pytest.raises(Stopped):
        run("cut", cut)
    again = run("cut", TestChannel())
    assert again.started().resumed_from_step == 2
    assert cut.losses() | again.losses() == whole.losses()
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


def test_a_checkpoint_is_handed_out_without_the_adapter_that_it_began_with(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path]
) -> None:
    initial, folder = learned
    config = next_config(initial, objective="dpo", max_steps=1)
    train(tiny_path, tmp_path, config, initial_adapter_path=str(folder))
    trained = adapter_bytes(tmp_path)
    train(tiny_path, tmp_path, config, hands_out=True)
    assert adapter_bytes(tmp_path) == trained


@pytest.mark.slow
def test_two_processes_compare_with_the_same_adapter(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path]
) -> None:
    initial, folder = learned
    config = next_config(initial, objective="dpo", batch_size=2, gradient_accumulation=2)
    more: dict[str, Any] = {"initial_adapter_path": str(folder)}
    alone = train(tiny_path, tmp_path / "alone", config, **more)
    together = train(tiny_path, tmp_path / "together", config, workers=["cpu"], **more)
    assert together.losses() == pytest.approx(alone.losses(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "has no tensor"),
        (lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(1)}), "has a tensor"),
        (lambda tensors: tensors.update({sorted(tensors)[0]: torch.ones(1, 1)}), r"is \(1, 1\), and the run's"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path], change: Any, why: str
) -> None:
    initial, folder = learned
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    config = next_config(initial)
    with pytest.raises(BadSetting, match=why):
        create_adapter(load(tiny_path, config), "new", config, "tests/tiny", None, continues=tmp_path)


def test_another_scaling_and_a_folder_that_is_not_there_are_refused(
    tiny_path: Path, tmp_path: Path, learned: tuple[InitialAdapter, Path]
) -> None:
    initial, folder = learned
    config = next_config(initial)
    other = recorded(config.model_dump() | {"alpha": 8})
    with pytest.raises(BadSetting, match="scales"):
        create_adapter(load(tiny_path, other), "new", other, "tests/tiny", None, continues=folder)
    with pytest.raises(BadSetting, match="cannot be read"):
        create_adapter(load(tiny_path, config), "new", config, "tests/tiny", None, continues=tmp_path / "gone")
    with pytest.raises(BadSetting, match="no adapter is named"):
        train_tiny(tiny_path, tmp_path, config)
