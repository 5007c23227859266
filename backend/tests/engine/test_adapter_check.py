"""An adapter whose files are not what was trained is not handed out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.small_models import make_small
from peft import LoraConfig

from domain.peft.algorithms import Algorithm
from domain.protocol import StepMetrics
from engine import frozen_weights, handing_out, methods
from engine.adapter_check import check_folder
from engine.base import Base
from engine.errors import CannotSave, ExportDiffers
from engine.training import train
from tests.engine.test_methods import config_for, load
from tests.support.stock_adapters import make_random_adapter
from tests.support.training_command import TestChannel, command_for

# PEFT warns of the patterns that it writes itself for parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
LAST = 2
SETTINGS = {"max_steps": LAST, "learning_rate": 1e-2}
NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


class After(TestChannel):
    """Calls something when the last step is taken: what was proved before it was right."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act

    def emit(self, event: Any) -> None:
        super().emit(event)
        if isinstance(event, StepMetrics) and event.step == LAST:
            self._act()


def _wrong_file(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    save: Callable[..., None] = getattr(handing_out, "save_file")  # noqa: B009 - the engine does not export it

    def wrong(state: dict[str, torch.Tensor], *rest: Any, **named: Any) -> None:
        other = dict(state)
        change(other)
        save(other, *rest, **named)

    monkeypatch.setattr(handing_out, "save_file", wrong)


def _wrong_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    save = LoraConfig.save_pretrained

    def wrong(self: LoraConfig, folder: str) -> None:
        save(LoraConfig(**self.to_dict() | {"lora_alpha": 2 * self.lora_alpha}), folder)

    monkeypatch.setattr(LoraConfig, "save_pretrained", wrong)


def _without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the factor by which a converted adapter makes up for the root of its rank."""
    convert = methods.as_plain_lora
    monkeypatch.setattr(
        methods,
        "as_plain_lora",
        lambda state, initial, config: convert(state, initial, LoraConfig(**config.to_dict() | {"use_rslora": False})),
    )


def _stale_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the weights that a method froze in the place of the base's own."""
    monkeypatch.setattr(frozen_weights, "_give_back", lambda *_: None)


FAULTS: dict[str, tuple[Algorithm, dict[str, Any], Callable[[pytest.MonkeyPatch], None], str]] = {
    "a lost key": (Algorithm.LORA, {}, lambda m: _wrong_file(m, lambda state: state.pop(NAME)), NAME),
    "a number": (Algorithm.DORA, {}, lambda m: _wrong_file(m, lambda s: s.update({NAME: s[NAME] * 1.001})), NAME),
    "another tensor": (Algorithm.LORA, {}, lambda m: _wrong_file(m, lambda s: s.update(x=s[NAME].clone())), "tensor"),
    "a swapped scaling": (Algorithm.RSLORA, {}, _wrong_alpha, "q_proj"),
    "a swapped scaling in 4 bits": (Algorithm.QLORA, {}, _wrong_alpha, "q_proj"),
    "a converted scaling": (Algorithm.PISSA, {}, _wrong_alpha, "q_proj"),
    "a lost root": (Algorithm.PISSA, {"use_rslora": True}, _without_root, "q_proj"),
    "a stale base": (Algorithm.PISSA, {}, _stale_base, "of the logits' size away"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_is_handed_out_is_found(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    algorithm, overrides, seed, named = FAULTS[fault]
    config = config_for(algorithm, **SETTINGS | overrides)
    base = load(tiny_path, config)
    with pytest.raises(CannotSave) as caught:
        train(base, command_for(tmp_path, config), After(lambda: seed(monkeypatch)))
    assert "ExportDiffers" in caught.value.message and named in caught.value.message
    assert base.adapters == [] and not (tmp_path / "adp").exists()
    kept = tmp_path / "adp-not-checked"
    assert kept.is_dir() == (fault == "a stale base") == (str(kept) in caught.value.message)


def test_a_fault_that_is_there_before_the_first_step_is_found_before_it(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(Algorithm.LORA, **SETTINGS)
    _wrong_alpha(monkeypatch)
    channel = TestChannel()
    with pytest.raises(CannotSave, match="scales"):
        train(load(tiny_path, config), command_for(tmp_path, config), channel)
    assert channel.losses() == {}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v32"])
def test_stacked_experts_are_compared_by_their_own_ranks(tiny_path: Path, tmp_path: Path, family: str) -> None:
    """PEFT writes patterns for them, by the parameter's name; here the files of one adapter meet another's."""
    source = make_small(family, tmp_path / "base", tiny_path)
    base = load(source, config_for(Algorithm.LORA))
    right = make_random_adapter(source, tmp_path / "right", target_modules="all-linear")
    base.attach("adp", right)
    check_folder(right, base, "adp", {})
    _refused(base, make_random_adapter(source, tmp_path / "size", 0.03, target_modules="all-linear"), "first tensor")
    _refused(base, make_random_adapter(source, tmp_path / "alpha", target_modules="all-linear", lora_alpha=4), "scales")
    _refused(base, make_random_adapter(source, tmp_path / "less", target_modules=["o_proj"]), "no tensor")


def _refused(base: Base, folder: Path, named: str) -> None:
    with pytest.raises(ExportDiffers, match=named):
        check_folder(folder, base, "adp", {})
