"""The training loop against a hand-written one, and every setting at the end of the chain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup, set_seed

from domain.jobs.figures import RunOutcome
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.protocol import Evaluated, StepMetrics
from engine import methods
from engine.base import Base
from engine.batches import Grouping, epoch_batches
from engine.errors import NotFinite
from engine.optimizer import planned_steps
from engine.rows import Row, RowStore
from engine.trainer import Trainer
from tests.engine.test_methods import config_for, load


def make_rows(count: int = 10) -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(6, 20, (count,), generator=generator).tolist()
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(4, 300, (length,), generator=generator).tolist()
        rows.append(Row(number, ids, [-100] * (length // 2) + ids[length // 2 :], False))
    return rows


class GoOn:
    """A client that asks for nothing."""

    def check_stop(self) -> None:
        pass

    def take_checkpoint_request(self) -> bool:
        return False


def run(
    path: Path, config: PeftConfig, rows: list[Row], validation: list[Row] | None = None
) -> tuple[Base, Trainer, list[Any], RunOutcome]:
    base = load(path, config)
    set_seed(config.seed)
    base.create("adp", methods.lora_config(config, base.model, "tests/tiny", None))
    events: list[Any] = []
    trainer = Trainer(
        base, config, RowStore(rows), RowStore(validation or []), request_id="r", emit=events.append, control=GoOn()
    )
    return base, trainer, events, trainer.run()


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepMetrics)]


def test_the_loss_curve_is_that_of_a_plain_loop(tiny_path: Path) -> None:
    """Full logits, transformers' own loss, no accumulation: the same numbers to rounding."""
    config = config_for(Algorithm.LORA, epochs=3.0, batch_size=4, learning_rate=1e-2, warmup_ratio=0.2, dropout=0.1)
    rows = make_rows()
    *_, events, outcome = run(tiny_path, config, rows)

    set_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    set_seed(config.seed)
    model = PeftModelForCausalLM(model, methods.lora_config(config, model, "tests/tiny", None))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 9)
    set_seed(config.seed)
    model.train()
    expected = []
    for epoch in range(3):
        batches = epoch_batches(RowStore(rows), Grouping(4, 64, False, 0), seed=42, epoch=epoch)
        for batch in batches:
            loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    assert outcome.steps == 9
    assert losses(events) == pytest.approx(expected, rel=1e-5)
    assert losses(events)[-1] < losses(events)[0]


def test_accumulation_equals_the_large_batch(tiny_path: Path) -> None:
    rows = make_rows(8)
    common = {"max_steps": 3, "learning_rate": 1e-2}
    *_, large, _ = run(tiny_path, config_for(Algorithm.LORA, batch_size=8, **common), rows)
    *_, small, _ = run(tiny_path, config_for(Algorithm.LORA, batch_size=2, gradient_accumulation=4, **common), rows)
    assert losses(small) == pytest.approx(losses(large), rel=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=4, dropout=0.2, learning_rate=1e-2)
    *_, first, _ = run(tiny_path, config, make_rows())
    *_, second, _ = run(tiny_path, config, make_rows())
    *_, other, _ = run(tiny_path, config.model_copy(update={"seed": 7}), make_rows())
    assert losses(first) == losses(second) != losses(other)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_nothing_but_memory(tiny_path: Path, packing: bool, checkpointing: bool) -> None:
    settings = {"max_steps": 3, "learning_rate": 1e-2, "packing": packing}
    *_, plain, _ = run(tiny_path, config_for(Algorithm.LORA, **settings), make_rows())
    config = config_for(Algorithm.LORA, gradient_checkpointing=checkpointing, **settings)
    *_, found, _ = run(tiny_path, config, make_rows())
    assert losses(found) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("linear", [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_scheduler(
    tiny_path: Path, scheduler: str, rates: list[float]
) -> None:
    config = config_for(Algorithm.LORA, max_steps=8, warmup_ratio=0.25, scheduler=scheduler, learning_rate=1e-3)
    *_, events, _ = run(tiny_path, config, make_rows())
    found = [event.learning_rate / 1e-3 for event in events if isinstance(event, StepMetrics)]
    assert found == pytest.approx(rates, abs=1e-6)


def test_weight_decay_clipping_and_the_optimizer_arrive(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=2, weight_decay=0.25, max_grad_norm=1e-3, learning_rate=3e-4)
    base, trainer, events, _ = run(tiny_path, config, make_rows())
    (group,) = trainer._optimizer.param_groups
    assert isinstance(trainer._optimizer, torch.optim.AdamW)
    assert (group["weight_decay"], group["initial_lr"]) == (0.25, 3e-4)
    assert len(group["params"]) == sum(1 for p in base.model.parameters() if p.requires_grad)
    norms = [event.grad_norm or 0.0 for event in events if isinstance(event, StepMetrics)]
    assert min(norms) > 1e-3  # measured before the clip


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = torch.optim.AdamW.step

    def watching(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.stack(gradients).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    run(tiny_path, config_for(Algorithm.LORA, max_steps=2, max_grad_norm=1e-3), make_rows())
    assert seen and max(seen) <= 1.001e-3


@pytest.mark.parametrize(
    ("settings", "batches", "steps"),
    [
        ({"epochs": 3.0}, 5, 15),
        ({"epochs": 3.0, "gradient_accumulation": 2}, 5, 9),
        ({"epochs": 0.5}, 5, 3),
        ({"max_steps": 2}, 5, 2),
    ],
)
def test_planned_steps(settings: dict[str, Any], batches: int, steps: int) -> None:
    assert planned_steps(config_for(Algorithm.LORA, **settings), batches) == steps


def test_evaluation_before_during_and_after(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=5, eval_every_steps=2, learning_rate=1e-2)
    rows = make_rows()
    *_, events, outcome = run(tiny_path, config, rows[:6], rows[6:])
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in evaluations] == [0, 2, 4, 5]
    assert outcome.initial_eval_loss == evaluations[0].eval_loss
    assert outcome.final_eval_loss == evaluations[-1].eval_loss


def test_early_stopping_stops_when_the_loss_no_longer_falls(tiny_path: Path) -> None:
    rows = make_rows()
    settings = {"max_steps": 40, "eval_every_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.5}
    *_, outcome = run(tiny_path, config_for(Algorithm.LORA, **settings), rows[:6], rows[6:])
    assert outcome.stopped_early and outcome.steps < 40


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rows(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA, max_steps=2, batch_size=2)
    base = load(tiny_path, config)
    base.create("adp", methods.lora_config(config, base.model, "tests/tiny", None))
    with torch.no_grad():
        next(p for p in base.model.parameters() if p.requires_grad).fill_(float("nan"))
    trainer = Trainer(
        base, config, RowStore(make_rows()), RowStore(), request_id="r", emit=lambda _: None, control=GoOn()
    )
    with pytest.raises(NotFinite, match=r"rows are \[\d+, \d+\]"):
        trainer.run()
