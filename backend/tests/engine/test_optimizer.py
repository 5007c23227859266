"""The optimizer's groups: one rate, or with LoRA+ one for A and another for the rest."""

from pathlib import Path

import pytest

from domain.peft.algorithms import Algorithm
from engine.optimizer import make_optimizer, make_scheduler
from tests.engine.test_methods import config_for, create, load


@pytest.mark.parametrize(("use_dora", "floor"), [(False, 0.0), (True, 0.0), (False, 0.25)])
def test_b_and_magnitudes_learn_at_a_multiple_of_as_rate_through_the_whole_schedule(
    tiny_path: Path, use_dora: bool, floor: float
) -> None:
    config = config_for(
        Algorithm.LORA_PLUS, lora_plus_ratio=8.0, learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.2,
        scheduler="cosine", use_dora=use_dora, min_learning_rate_ratio=floor,
    )  # fmt: skip
    base = load(tiny_path, config)
    create(base, config)
    named = {name: p for name, p in base.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(named, config)
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert held.keys() == {id(p) for p in named.values()}
    scheduler = make_scheduler(optimizer, config, 10)
    for _ in range(10):
        rates = {("lora_A" in name, held[id(p)]["lr"]) for name, p in named.items()}
        slow = scheduler.get_last_lr()[0]
        assert dict(rates) == pytest.approx({True: slow, False: 8 * slow}) and len(rates) == 2
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([floor * 1e-3, floor * 8e-3], abs=1e-15)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_without_a_ratio_there_is_one_group(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA, learning_rate=1e-3)
    base = load(tiny_path, config)
    create(base, config)
    named = {name: p for name, p in base.model.named_parameters() if p.requires_grad}
    (group,) = make_optimizer(named, config).param_groups
    assert (group["lr"], len(group["params"])) == (1e-3, len(named))
