"""A weight that several layers hold gets one adapter, and a merge adds it once."""

from pathlib import Path

import pytest
import torch
from families import trial
from families.small_models import make_small

from domain.peft.algorithms import Algorithm
from domain.protocol import AboutExport, CheckExport, Merge
from engine import methods
from engine.base import Base
from engine.errors import BadSetting, ExportDiffers
from engine.export_check import check_export
from engine.initialisation import create_adapter
from engine.merge import merge
from engine.shared_weights import repeats, shared_parameters
from tests.support.channel_double import RecordingChannel
from tests.support.stock_adapters import make_random_adapter

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")]
_BLOCK = "model.layers.{}.shared_transformer.feed_forward"


@pytest.fixture(scope="module")
def repeating(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which layer 3 computes with layer 1's block, and with small modules of its own in it."""
    folder = tmp_path_factory.mktemp("repeating") / "zamba2"
    make_small("zamba2", folder, tiny_path)
    return folder


def test_modules_of_one_weight_train_one_adapter_and_are_counted_once(repeating: Path) -> None:
    config = trial._config(Algorithm.LORA)
    base = Base(repeating, config, "cpu", "transformers")
    assert repeats(base.model)[f"{_BLOCK.format(3)}.down_proj"] == f"{_BLOCK.format(1)}.down_proj"
    create_adapter(base, "adp", config, "small/model", None)
    model = base.model.get_base_model()
    for path in ("down_proj", "gate_up_proj", "gate_up_proj_adapter_list.0.0", "gate_up_proj_adapter_list.1.0"):
        one, other = (model.get_submodule(f"{_BLOCK.format(layer)}.{path}") for layer in (1, 3))
        assert one is not other and one.lora_A["adp"].weight is other.lora_A["adp"].weight
        assert one.lora_B["adp"].weight is other.lora_B["adp"].weight
    trained = sum(parameter.numel() for parameter in base.trained.values())
    assert trained == base.trainable_parameters == methods.trainable_parameters(base.model, config)
    assert any("lm_head.weight" in names for names in shared_parameters(base.model))


def test_a_decomposition_takes_its_product_off_a_shared_weight_once(repeating: Path) -> None:
    config = trial._config(Algorithm.PISSA)
    base = Base(repeating, config, "cpu", "transformers")
    before = base.model.get_submodule(f"{_BLOCK.format(1)}.down_proj").weight.clone()
    create_adapter(base, "adp", config, "small/model", None)
    layer = base.model.get_base_model().get_submodule(f"{_BLOCK.format(3)}.down_proj")
    product = layer.scaling["adp"] * layer.lora_B["adp"].weight @ layer.lora_A["adp"].weight
    torch.testing.assert_close(layer.base_layer.weight + product, before, rtol=0, atol=1e-5)


def test_an_adapter_that_corrects_one_weight_in_two_ways_is_not_merged(
    repeating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_random_adapter(repeating, tmp_path / "adapter", target_modules=["down_proj"])
    base = Base(repeating, trial._config(Algorithm.LORA), "cpu", "transformers")
    about = AboutExport(
        adapter_id="adp", adapter_name="adapter", adapter_version=1, base_model_id="small/model", base_revision=None,
        format="merged", created_at="2026-01-01T00:00:00.000000Z",
    )  # fmt: skip
    command = Merge(
        request_id="r", adapter_id="adp", adapter_path=str(adapter), output_path=str(tmp_path / "merged"),
        base_model_id="small/model", about=about,
    )  # fmt: skip
    with pytest.raises(BadSetting, match=r"holds one weight as .*layers\.1\..*layers\.3\..*corrects it differently"):
        merge(base, command, RecordingChannel())
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr("engine.merged_weights.correct_alike", lambda *_: True)
    merge(base, command, RecordingChannel())
    check = CheckExport(
        request_id="r", base_path=str(repeating), adapter_path=str(adapter), export_path=command.output_path,
        gguf_file=None, precision="fp32", quantization="none", rounded_elsewhere=False,
    )  # fmt: skip
    with pytest.raises(ExportDiffers, match=r"layers\.3\..*which it holds as .*layers\.1\."):
        check_export(check, RecordingChannel())
