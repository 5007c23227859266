"""Families with stacked experts, trained with adapters on them: count, run, resume, stock PEFT, merge, answer."""

from pathlib import Path
from typing import Any

import pytest
from families import trial
from families.small_models import make_small

from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig

# (out, in) and (in, out) with biases; all experts in one product; shared experts beside them, a dense layer before
# them; a state space; files that hold them one by one, in one tensor, or by other names.
QUICK = ("mixtral", "gpt_oss", "llama4_text", "ernie4_5_moe")
OTHERS = ("qwen3_moe", "qwen3_5_moe", "deepseek_v3", "glm4_moe", "minimax_m2", "granitemoe", "qwen2_moe")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_experts_are_counted_trained_resumed_merged_and_answer(
    family: str, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = trial._config

    def with_experts(method: Algorithm, **overrides: Any) -> PeftConfig:
        return without(method, **overrides).model_copy(update={"target_experts": True, "dropout": 0.05})

    monkeypatch.setattr(trial, "_config", with_experts)
    make_small(family, tmp_path / "model", tiny_path)
    tried = trial.try_family(family, tmp_path / "model", tmp_path / "runs", (Algorithm.LORA, Algorithm.QLORA))
    assert {name: why for name, why in tried.results.items() if why != "yes"} == {}
    assert {"exact count", "qlora", "resume to the bit", "stock PEFT", "merge", "generate"} <= set(tried.results)
