"""What the `train` command makes of a dataset's rows before it trains."""

import json
from pathlib import Path

import pytest

from domain.peft.algorithms import Algorithm
from engine.errors import BadData
from tests.engine.test_methods import config_for
from tests.support.training_command import train_tiny


def conversations(*prompts: str) -> str:
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "y"}] for prompt in prompts]
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)


def test_rows_with_nothing_to_learn_are_named(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(conversations(*["x " * 100] * 30))
    config = config_for(Algorithm.LORA, max_steps=1, max_seq_length=32)
    named = ", ".join(map(str, range(1, 21)))
    with pytest.raises(BadData, match=f"within 32 tokens: rows {named} and 10 more"):
        train_tiny(
            tiny_path, tmp_path / "run", config, dataset_path=str(tmp_path / "long.jsonl"), validation_fraction=0.0
        )


def test_a_dataset_may_validate_itself_and_idle_rows_are_left_out_of_both(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(conversations("a", "x " * 100, "b", "c"))
    config = config_for(Algorithm.LORA, max_steps=1, max_seq_length=32)
    result = train_tiny(
        tiny_path, tmp_path / "run", config,
        dataset_path=str(path), validation_path=str(path), validation_fraction=0.0,
    )  # fmt: skip
    assert (result.rows, result.validation_rows) == (3, 3)
