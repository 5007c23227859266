"""What is taken of an adapter's card that a stranger wrote."""

import json
from pathlib import Path

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from services.adapters.checks import read_card


def test_only_figures_that_a_database_can_keep_are_taken_of_a_card(tmp_path: Path) -> None:
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    config = configure(Algorithm.LORA, use_case=None, overrides={}, machine=machine).config.model_dump(mode="json")
    outcome = '{"steps": 5, "final_loss": 0.5, "first_loss": 1e999, "tokens": -1e999, "best_eval_loss": null, "x": []}'
    (tmp_path / "training.json").write_text(f'{{"config": {json.dumps(config)}, "outcome": {outcome}}}')
    assert read_card(tmp_path, "it").metrics == {"steps": 5, "final_loss": 0.5, "best_eval_loss": None}
