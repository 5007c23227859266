"""Families of different kinds in small: the count, a run, its resume, stock PEFT, the merge, an answer."""

from pathlib import Path

import pytest
from families.__main__ import CHECKS, results_of, try_apart
from families.small_models import families, make_small
from families.trial import try_family

from domain.peft.algorithms import Algorithm

# Plain, fused, tied, capped; experts that stay and shared ones; eager attention with sinks; a router that is a linear
# module; an indexer without a gradient; state spaces; a block that several layers share; towers.
KINDS = (
    *("gpt2", "phi3", "gemma4_text", "qwen2_moe", "deepseek_v32", "ernie4_5_moe", "minimax_m2", "gpt_oss", "llama4"),
    *("nemotron_h", "zamba2", "mamba", "qwen3_5_moe", "bloom", "gemma3", "qwen2_5_vl"),
)
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


@pytest.mark.parametrize("family", KINDS)
def test_a_family_is_counted_trained_resumed_merged_and_answers(family: str, tiny_path: Path, tmp_path: Path) -> None:
    make_small(family, tmp_path / "model", tiny_path)
    trial = try_family(family, tmp_path / "model", tmp_path / "runs", methods=(Algorithm.LORA,))
    assert {name: why for name, why in trial.results.items() if why != "yes"} == {}
    assert trial.parameters > 0 and {"merge", "stock PEFT", "resume to the bit", "exact count"} <= set(trial.results)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", families())
def test_every_family_passes_with_every_method_or_cannot_be_made_small(family: str) -> None:
    row = try_apart(family)
    if "not_made" in row:
        pytest.skip(str(row["not_made"]))
    assert {name: why for name, why in results_of(row).items() if why != "yes"} == {}
    assert set(CHECKS) <= set(results_of(row))
