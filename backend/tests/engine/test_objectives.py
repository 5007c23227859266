"""Learning from preferences: the losses against their formulas on whole logits, packing, accumulation, resume."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from core.errors import SettingRejected
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.peft.objectives import Objective
from domain.protocol import Evaluated, StepMetrics
from engine.batches import epoch_batches, grouping_of
from engine.channel import Stopped
from engine.examples import ExampleTokenizer, conversations, teaches
from engine.objectives import Size, log1mexp, objective_of
from engine.rows import IGNORED, Row, RowStore
from tests.engine.test_methods import config_for, create, disturb, load
from tests.support.rows import judged_jsonl, preference_jsonl
from tests.support.training_command import TestChannel, adapter_bytes, command_for, train_tiny

OBJECTIVES: tuple[Objective, ...] = ("dpo", "orpo", "kto")
RUN = {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 4, "learning_rate": 1e-2, "eval_every_steps": 2}


def data_of(objective: Objective) -> str:
    return judged_jsonl() if objective == "kto" else preference_jsonl()


def config_of(objective: Objective, **settings: Any) -> PeftConfig:
    return config_for(Algorithm.LORA, objective=objective, **settings)


def train(
    tiny_path: Path, folder: Path, config: PeftConfig, channel: TestChannel | None = None, **changes: Any
) -> TestChannel:
    channel = channel or TestChannel()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_text(data_of(config.objective))
    train_tiny(tiny_path, folder, config, channel, dataset_path=str(folder / "data.jsonl"), **changes)
    return channel


def examples_of(base: Any, config: PeftConfig) -> list[list[Row]]:
    tokenizer = ExampleTokenizer(base.tokenizer, config)
    rows = [json.loads(line) for line in data_of(config.objective).splitlines()]
    return [example for number, row in enumerate(rows) for example in tokenizer.examples(number, row)]


def sequence_log_probability(model: Any, row: Row) -> tuple[torch.Tensor, int]:
    """Return the log-probability of a row's learned tokens from whole logits of the row alone, and their number."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].float()
    targets = torch.tensor(row.labels[1:])
    learned = targets != IGNORED
    each = functional.log_softmax(logits[learned], dim=-1).gather(1, targets[learned, None])
    return each.sum(), int(learned.sum())


def by_formula(base: Any, config: PeftConfig, examples: list[list[Row]]) -> torch.Tensor:
    """Compute the mean loss of some examples, one sequence at a time, as the papers write it."""
    model, beta, total = base.model, config.preference_beta, torch.zeros(())
    assert beta is not None
    with torch.no_grad():
        now = [[sequence_log_probability(model, row) for row in example] for example in examples]
        with model.disable_adapter():
            before = [[sequence_log_probability(model, row)[0] for row in example] for example in examples]
        moved = torch.zeros(())
        if config.objective == "kto":
            crossed = []
            for at, (row,) in enumerate(examples):
                (other,) = examples[at - 1]
                prompt = [label == IGNORED for label in row.labels].index(False)
                answer = [label == IGNORED for label in other.labels].index(False)
                ids, labels = row.ids[:prompt] + other.ids[answer:], row.labels[:prompt] + other.labels[answer:]
                crossed.append(Row(0, ids, labels, False))
            there = [sequence_log_probability(model, row)[0] for row in crossed]
            with model.disable_adapter():
                moved = torch.stack([
                    one - sequence_log_probability(model, row)[0] for one, row in zip(there, crossed, strict=True)
                ]).mean().clamp(min=0)  # fmt: skip
        for example, after, base_ones in zip(examples, now, before, strict=True):
            if config.objective == "dpo":
                gains = [one - other for (one, _), other in zip(after, base_ones, strict=True)]
                total -= functional.logsigmoid(beta * (gains[0] - gains[1]))
            elif config.objective == "kto":
                gain = after[0][0] - base_ones[0]
                total += 1 - torch.sigmoid(beta * (gain - moved if example[0].liked else moved - gain))
            else:
                means = [one / count for one, count in after]
                odds = [mean - torch.log1p(-mean.exp()) for mean in means]
                total -= means[0] + beta * functional.logsigmoid(odds[0] - odds[1])
    return total / len(examples)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_is_the_one_of_its_paper(tiny_path: Path, objective: Objective, packing: bool) -> None:
    config = config_of(objective, batch_size=16, packing=packing, max_seq_length=64)
    base = load(tiny_path, config)
    create(base, config)
    disturb(base)
    examples = examples_of(base, config)
    assert all(teaches(example) for example in examples)
    rows = RowStore(row for example in examples for row in example)
    batches = list(epoch_batches(rows, grouping_of(config, 0), seed=1, epoch=0))
    minimised = objective_of(base, config)
    loss = sum(float(minimised(batch, Size.of(batches)).loss.detach()) for batch in batches)
    if objective == "kto":  # its answers are compared within a pass: the order of the batch counts
        assert len(batches) == 1
        examples = [examples[number] for number in batches[0].rows]
    assert loss == pytest.approx(float(by_formula(base, config, examples)), rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_preference_is_learned(tiny_path: Path, tmp_path: Path, objective: Objective) -> None:
    channel = train(tiny_path, tmp_path, config_of(objective, **RUN | {"max_steps": 12}))
    steps = [event for event in channel.events if isinstance(event, StepMetrics)]
    first, last = steps[0].preference, steps[-1].preference
    assert first is not None and last is not None
    assert last.margin > first.margin and last.accuracy > 0.8
    assert steps[-1].loss < steps[0].loss
    if objective == "dpo":  # adapter and base are the same at first
        assert steps[0].loss == pytest.approx(math.log(2), rel=1e-5) and first.margin == 0
    if objective == "kto":
        assert steps[0].loss == pytest.approx(0.5, rel=1e-5) and last.moved is not None
    evaluations = [event for event in channel.events if isinstance(event, Evaluated)]
    assert all(event.preference is not None for event in evaluations)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_accumulation_and_packing_give_the_step_of_one_large_batch(
    tiny_path: Path, tmp_path: Path, objective: Objective
) -> None:
    """Every pair is in each step, so that only the way of computing differs."""
    one = {"max_steps": 3, "learning_rate": 1e-2}
    no_validation: dict[str, Any] = {"validation_fraction": 0.0}
    large = train(
        tiny_path, tmp_path / "large", config_of(objective, batch_size=16, gradient_accumulation=1, **one),
        **no_validation,
    )  # fmt: skip
    small = train(
        tiny_path, tmp_path / "small", config_of(objective, batch_size=2, gradient_accumulation=8, **one),
        **no_validation,
    )  # fmt: skip
    packed = train(
        tiny_path, tmp_path / "packed",
        config_of(objective, batch_size=16, gradient_accumulation=1, packing=True, max_seq_length=128, **one),
        **no_validation,
    )  # fmt: skip
    assert small.losses() == pytest.approx(large.losses(), rel=1e-4)
    assert packed.losses() == pytest.approx(large.losses(), rel=1e-4)


class StopsAfter(TestChannel):
    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def check_stop(self, request_id: str) -> None:
        if len(self.losses()) >= self._step:
            raise Stopped("pause")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_resumes_to_the_bit(tiny_path: Path, tmp_path: Path, objective: Objective) -> None:
    config = config_of(objective, dropout=0.2, packing=objective == "dpo", **RUN)
    whole = train(tiny_path, tmp_path / "whole", config)
    cut = StopsAfter(2)
    with pytest.raises(Stopped):
        train(tiny_path, tmp_path / "cut", config, cut)
    again = train(tiny_path, tmp_path / "cut", config)
    assert cut.losses() | again.losses() == whole.losses()
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_learn_the_same_preferences(tiny_path: Path, tmp_path: Path, objective: Objective) -> None:
    alone = train(tiny_path, tmp_path / "alone", config_of(objective, **RUN))
    together = train(tiny_path, tmp_path / "together", config_of(objective, **RUN), workers=["cpu"])
    assert together.losses() == pytest.approx(alone.losses(), rel=1e-4)


@pytest.mark.parametrize("algorithm", [Algorithm.QLORA, Algorithm.DORA, Algorithm.RSLORA])
def test_the_base_under_an_adapter_of_each_method_is_what_is_compared_with(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm
) -> None:
    channel = TestChannel()
    config = config_for(algorithm, objective="dpo", **RUN)
    (tmp_path / "data.jsonl").write_text(preference_jsonl())
    train_tiny(tiny_path, tmp_path, config, channel, dataset_path=str(tmp_path / "data.jsonl"))
    assert channel.losses()[1] == pytest.approx(math.log(2), rel=1e-5)


def test_only_the_answers_that_are_compared_are_learned(tiny_path: Path) -> None:
    config = config_of("dpo")
    base = load(tiny_path, config)
    row = json.loads(preference_jsonl(1))
    better, worse = ExampleTokenizer(base.tokenizer, config).examples(0, row)[0]
    for sequence, answer in ((better, "0 1 2"), (worse, "no 0")):
        learned = [token for token, label in zip(sequence.ids, sequence.labels, strict=True) if label != IGNORED]
        assert answer in base.tokenizer.decode(learned) and "yes?" not in base.tokenizer.decode(learned)
    assert better.ids != worse.ids


def test_a_pair_that_the_limit_makes_equal_or_empty_teaches_nothing(tiny_path: Path, tmp_path: Path) -> None:
    """A limit at which the longest prompts leave no room for an answer."""
    config = config_of("dpo", max_seq_length=24, batch_size=2, max_steps=1)
    base = load(tiny_path, config)
    examples = examples_of(base, config)
    assert any(teaches(example) for example in examples) and not all(teaches(example) for example in examples)
    command = command_for(tmp_path, config, dataset_path=str(tmp_path / "data.jsonl"), validation_fraction=0.0)
    (tmp_path / "data.jsonl").write_text(preference_jsonl())
    channel = TestChannel()
    from engine.training import train as run

    run(base, command, channel)
    started = channel.started()
    assert started.rows == sum(teaches(example) for example in examples)
    assert started.rows + started.skipped_rows == len(examples)


def refusal(**settings: Any) -> Callable[[], PeftConfig]:
    return lambda: config_for(settings.pop("algorithm", Algorithm.LORA), **settings)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (refusal(objective="dpo", algorithm=Algorithm.PISSA), "objective"),
        (refusal(objective="kto", algorithm=Algorithm.OLORA), "objective"),
        (refusal(objective="dpo", train_on="all"), "train_on"),
        (refusal(objective="kto", batch_size=1), "batch_size"),
        (refusal(preference_beta=0.2), "preference_beta"),
        (refusal(objective="dpo", preference_beta=None), "preference_beta"),
        (refusal(objective="dpo", preference_beta=0.0), "preference_beta"),
        (refusal(objective="ppo"), "objective"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(make: Callable[[], PeftConfig], name: str) -> None:
    with pytest.raises(SettingRejected) as refused:
        make()
    assert [error["location"] for error in refused.value.extras["errors"]] == [[name]]


def test_orpo_needs_no_base_and_takes_every_method() -> None:
    assert config_for(Algorithm.PISSA, objective="orpo").init_weights == "pissa"


@given(st.floats(-50, -1e-6))
def test_the_log_of_one_less_an_exponential_is_exact(value: float) -> None:
    exact = math.log(-math.expm1(value))
    assert float(log1mexp(torch.tensor(value, dtype=torch.float64))) == pytest.approx(exact, rel=1e-9, abs=1e-15)


def test_a_conversation_without_preferences_is_itself() -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert conversations(row) == [row]
