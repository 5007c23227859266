"""Methods that start from a decomposition: what they freeze, where they start, and that the base gets its own back."""

import copy
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file

from core.errors import StorageFull
from domain.peft.algorithms import Algorithm
from engine import methods
from engine.base import Base
from engine.errors import BadSetting
from engine.frozen_weights import adapted_layer, base_layer
from engine.initialisation import create_adapter
from services.adapter_service import AdapterService
from tests.engine.test_methods import PROBE, config_for, create, disturb, kept, load, logits
from tests.support.small_disk import fill, mounted
from tests.support.variants import VARIANTS

DECOMPOSED = [Algorithm.PISSA, Algorithm.OLORA]
IN_4_BITS = {"quantization": "nf4"}
CHANGED = {name: VARIANTS[name] for name in ("pissa", "pissa nf4", "olora", "olora nf4", "loftq 3")}


def q_proj(base: Base) -> Any:
    return adapted_layer(base.model, "model.layers.0.self_attn.q_proj")


def dense(module: Any) -> torch.Tensor:
    return dequantize_module_weight(module).detach().float()


def product(layer: Any) -> torch.Tensor:
    return (layer.scaling["adp"] * layer.lora_B["adp"].weight @ layer.lora_A["adp"].weight).detach()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("algorithm", DECOMPOSED)
def test_on_weights_of_full_precision_every_bit_is_pefts(tiny_path: Path, algorithm: Algorithm, rslora: bool) -> None:
    config = config_for(algorithm, use_rslora=rslora, alpha=6)
    base = load(tiny_path, config)
    create(base, config)
    named = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora,
        init_lora_weights=config.init_weights,
    )  # fmt: skip
    stock = PeftModelForCausalLM(load(tiny_path, config).model, named, adapter_name="adp")
    ours, pefts = base.model.state_dict(), stock.state_dict()
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[name], pefts[name]) for name in pefts)


@pytest.mark.parametrize(("algorithm", "overrides"), CHANGED.values(), ids=CHANGED)
def test_the_base_gets_its_own_weights_back_to_the_bit(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, overrides: dict[str, Any]
) -> None:
    config = config_for(algorithm, **overrides)
    base = load(tiny_path, config)
    before, output = copy.deepcopy(base.model.state_dict()), logits(base)
    with pytest.raises(RuntimeError, match="cut off"), kept(base, config, tmp_path):
        create(base, config)
        assert not torch.equal(q_proj(base).get_base_layer().weight, before["model.layers.0.self_attn.q_proj.weight"])
        raise RuntimeError("cut off")
    base.detach("adp")
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(base), output)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_any_weight_is_changed(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.PISSA)
    base = load(tiny_path, config)
    with mounted(tmp_path / "small", "64k") as scratch:
        with pytest.raises(StorageFull, match="small"), kept(base, config, scratch):
            pytest.fail("the weights were not kept")
        assert not list(scratch.iterdir())
        fill(scratch)
        with pytest.raises(StorageFull, match="small"), kept(base, config, scratch):
            pytest.fail("the weights were not kept")


def test_an_engine_whose_base_cannot_have_its_weights_back_ends(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.PISSA)
    base = load(tiny_path, config)
    with pytest.raises(SystemExit, match="own weights cannot be put back"), kept(base, config, tmp_path):
        create(base, config)
        (folder,) = tmp_path.iterdir()
        (folder / "5.safetensors").unlink()


def test_what_a_killed_run_leaves_of_the_originals_is_deleted_at_the_next_start(
    tiny_path: Path, tmp_path: Path
) -> None:
    config, folder = config_for(Algorithm.PISSA), tmp_path / "adapters"
    base = load(tiny_path, config)
    (tmp_path / "scratch").mkdir()
    with kept(base, config, tmp_path / "scratch"):
        shutil.copytree(tmp_path / "scratch", folder)
    (folder / "adp_1").mkdir()
    AdapterService(cast(Any, None), folder, cast(Any, None)).remove_leftovers()
    assert [path.name for path in folder.iterdir()] == ["adp_1"]


def test_pissa_in_4_bits_takes_the_factors_from_full_precision_and_rounds_the_residual(tiny_path: Path) -> None:
    config = config_for(Algorithm.PISSA, **IN_4_BITS)
    base = load(tiny_path, config)
    rounded = dense(base_layer(base.model, "model.layers.0.self_attn.q_proj"))
    create(base, config)
    layer = q_proj(base)
    weight = load_file(tiny_path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    full = load(tiny_path, config_for(Algorithm.PISSA))
    create(full, config_for(Algorithm.PISSA))
    assert torch.equal(product(layer), product(q_proj(full)))
    residual = weight - product(layer)
    from bitsandbytes import functional

    expected = functional.dequantize_4bit(
        *functional.quantize_4bit(residual, quant_type="nf4", compress_statistics=True)
    )
    assert torch.equal(dense(layer.get_base_layer()), expected)
    # The paper's point: less is lost than by rounding W (section 4, table on quantisation errors).
    error = (dense(layer.get_base_layer()) + product(layer) - weight).norm()
    assert error < (rounded - weight).norm()
    stored = layer.get_base_layer().weight
    assert stored.dtype == torch.uint8 and stored.numel() == weight.numel() // 2


@pytest.mark.parametrize("algorithm", DECOMPOSED)
def test_a_4_bit_base_with_another_adapter_and_named_targets_can_be_decomposed(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm
) -> None:
    config = config_for(algorithm, target_modules=["q_proj"], **IN_4_BITS)
    base = load(tiny_path, config)
    base.create("other", methods.lora_config(config_for(Algorithm.LORA), base.model, "tests/tiny", None))
    disturb(base)
    base.model.eval()
    with base.using("other"):
        output = logits(base)
    assert methods.changed_layers(base.model, config) == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    with kept(base, config, tmp_path):
        create(base, config)
    base.detach("adp")
    with base.using("other"):
        assert torch.equal(logits(base), output)


@pytest.mark.parametrize(("algorithm", "overrides"), CHANGED.values(), ids=CHANGED)
def test_a_run_that_goes_on_freezes_the_same_bits(
    tiny_path: Path, algorithm: Algorithm, overrides: dict[str, Any]
) -> None:
    config = config_for(algorithm, **overrides)
    first, second = load(tiny_path, config), load(tiny_path, config)
    initial = create(first, config)
    create_adapter(second, "adp", config, "tests/tiny", None, initial)
    ours, again = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(ours[name], again[name]) for name in ours if "lora_" not in name)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("algorithm", "overrides"), CHANGED.values(), ids=CHANGED)
def test_what_is_handed_out_is_a_plain_lora_on_the_published_weights(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, overrides: dict[str, Any], rslora: bool
) -> None:
    config = config_for(algorithm, **{"use_rslora": rslora, "alpha": 6} | overrides)
    base = load(tiny_path, config)
    initial = create(base, config)
    disturb(base)
    if config.quantization != "none":
        moved = _undo_rounding(base, tiny_path, initial)
        rounded = (logits(load(tiny_path, config)) - logits(load(tiny_path, config_for(Algorithm.LORA)))).abs().max()
        assert 0 < moved < 2 * rounded  # nothing but rounding, of the size that a 4-bit base has anyway
    expected = logits(base)
    state, lora = methods.as_plain_lora(
        methods.adapter_state(base.model, "adp"), initial, base.model.peft_config["adp"]
    )
    assert (lora.r, lora.init_lora_weights, lora.use_rslora) == (8, True, rslora)
    save_file(state, tmp_path / "adapter_model.safetensors")
    lora.save_pretrained(str(tmp_path))
    full = load(tiny_path, config_for(Algorithm.LORA))
    bare = logits(full)
    stock = PeftModel.from_pretrained(full.model, str(tmp_path)).eval()
    with torch.no_grad():
        found = stock(input_ids=PROBE, use_cache=False).logits
    assert (expected - bare).abs().max() > 1e-2  # it did learn something
    assert torch.allclose(found, expected, atol=1e-4)


def _undo_rounding(base: Base, folder: Path, initial: dict[str, torch.Tensor]) -> float:
    """Put each residual as it was before it was rounded under the adapter; return how far the logits move."""
    before = logits(base)
    weights = load_file(folder / "model.safetensors")
    for path in methods.targeted_layers(base.model, config_for(Algorithm.LORA)):
        layer = adapted_layer(base.model, path)
        a, b = (initial[f"base_model.model.{path}.{part}.weight"] for part in ("lora_A", "lora_B"))
        residual = torch.nn.Linear(a.shape[1], b.shape[0], bias=False)
        residual.weight.data = weights[f"{path}.weight"] - layer.scaling["adp"] * b @ a
        layer.base_layer = residual
    return float((logits(base) - before).abs().max())


def test_a_rank_beyond_the_weights_and_files_without_the_weights_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.PISSA, rank=64)
    with pytest.raises(BadSetting, match="32 × 64"):
        create(load(tiny_path, config), config)
    config = config_for(Algorithm.PISSA, **IN_4_BITS)
    base = load(tiny_path, config)
    weights = load_file(tiny_path / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj.weight"
    for changed in (
        {name: weight for name, weight in weights.items() if name != path},
        weights | {path: weights[path].T},
    ):
        save_file({name: weight.contiguous() for name, weight in changed.items()}, tmp_path / "model.safetensors")
        base.path = tmp_path
        with pytest.raises(BadSetting, match=r"layers\.0\.self_attn\.q_proj"):
            create(base, config)
        base.detach("adp")


def test_loftq_corrects_the_rounding_and_more_iterations_correct_more(tiny_path: Path) -> None:
    published = load_file(tiny_path / "model.safetensors")
    untouched = load(tiny_path, config_for(Algorithm.QLORA))
    lost: list[float] = []
    for iterations in (1, 2, 5):
        config = config_for(Algorithm.LOFTQ, rank=16, alpha=6, loftq_iterations=iterations)
        base = load(tiny_path, config)
        initial = create(base, config)
        total = 0.0
        for path in methods.targeted_layers(base.model, config):
            layer, weight = adapted_layer(base.model, path), published[f"{path}.weight"]
            frozen, own = dense(layer.get_base_layer()), dense(base_layer(untouched.model, path))
            assert torch.equal(frozen, own) == (iterations == 1)
            left, best = weight - frozen - product(layer), torch.linalg.svdvals(weight - frozen)[16:]
            assert torch.allclose(left.norm(), best.norm(), rtol=1e-4)  # no product of rank r corrects more
            assert left.norm() < (weight - own).norm()
            total += float(left.norm() ** 2)
        assert bool(initial) == (iterations > 1)
        lost.append(total)
    assert lost[0] > lost[1] > lost[2]
