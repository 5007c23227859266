"""The same seed, rows and settings give the same loss curve in three ways of training."""

from pathlib import Path
from typing import Any

import pytest

from domain.peft.algorithms import Algorithm
from engine.rows import RowStore
from tests.engine.test_methods import config_for
from tests.engine.test_trainer import make_rows
from tests.support import preferences_in_trl
from tests.support.random_adapter import make_random_adapter
from tests.support.three_ways import WARMUP_STEPS, engine_losses, losses_by_hand, losses_in_trl

# Relative. Of fp32: the engine's head runs only where there is a loss, so that sums are made in another order; one or
# two units in the last place (2e-7) were measured, after 15 steps.
TOLERANCE = 1e-6
SETTINGS: dict[str, Any] = {
    "rank": 4,
    "alpha": 4,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "epochs": 5.0,
    "learning_rate": 2e-2,
    "warmup_ratio": WARMUP_STEPS / 15,
    "scheduler": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}


# PEFT's own LoftQ computes on a GPU alone; test_initialisation.py has its numbers.
@pytest.mark.parametrize("algorithm", [algorithm for algorithm in Algorithm if algorithm is not Algorithm.LOFTQ])
# Other libraries' own; what they warn of is neither of our doing nor of the numbers.
@pytest.mark.filterwarnings("default")
def test_the_engine_trl_and_a_loop_by_hand_have_one_loss_curve(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm
) -> None:
    slower = {"learning_rate": 2e-3} if algorithm is Algorithm.LORA_PLUS else {}  # B learns 16 times as fast
    config = config_for(algorithm, **SETTINGS | slower)
    rows = RowStore(make_rows(24))
    ours = engine_losses(tiny_path, config, rows)
    by_hand = losses_by_hand(tiny_path, config, rows)
    in_trl = losses_in_trl(tiny_path, config, rows, tmp_path)
    assert len(ours) == 15 and ours[-1] < ours[0] - 0.3
    assert ours == pytest.approx(by_hand, rel=TOLERANCE)
    assert ours == pytest.approx(in_trl, rel=TOLERANCE)
    assert by_hand == pytest.approx(in_trl, rel=TOLERANCE)


@pytest.mark.filterwarnings("default")
def test_trl_alone_rounds_the_adapter_on_a_4_bit_base(tiny_path: Path, tmp_path: Path) -> None:
    """Why the test above puts TRL's adapter back in fp32, and how far apart the curves are if it does not."""
    config = config_for(Algorithm.QLORA, **SETTINGS)
    rows = RowStore(make_rows(24))
    in_trl = losses_in_trl(tiny_path, config, rows, tmp_path, as_it_is=True)
    ours = engine_losses(tiny_path, config, rows)
    apart = max(abs(one / other - 1) for one, other in zip(ours, in_trl, strict=True))
    assert TOLERANCE < apart < 1e-3


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_are_learned_with_the_loss_curve_of_trl(tiny_path: Path, tmp_path: Path, objective: str) -> None:
    config = preferences_in_trl.config_for(objective, learning_rate=5e-3)
    rows = preferences_in_trl.rows_for(tiny_path, config)
    ours = engine_losses(tiny_path, config, rows)
    assert ours == pytest.approx(preferences_in_trl.losses_in_trl(tiny_path, config, rows, tmp_path), rel=1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_after_answers_have_the_loss_curve_of_trl(tiny_path: Path, tmp_path: Path, objective: str) -> None:
    """The adapter that is continued is also what both compare with."""
    first = preferences_in_trl.config_for(objective, learning_rate=5e-3)
    before = tmp_path / "before"
    make_random_adapter(tiny_path, before, "tests/tiny", first.rank, 3, size=0.1, lora_alpha=first.alpha)
    config = first.model_copy(update={"init_weights": "adapter"})
    rows = preferences_in_trl.rows_for(tiny_path, config)
    ours = engine_losses(tiny_path, config, rows, before)
    assert ours == pytest.approx(preferences_in_trl.losses_in_trl(tiny_path, config, rows, tmp_path, before), rel=1e-5)
    assert ours[-1] < ours[0]
