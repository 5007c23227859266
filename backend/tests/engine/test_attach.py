"""A plain LoRA is put straight into the layers, as PEFT's loader would have left it; what is not plain goes to PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from engine import attach as module
from engine import methods
from engine.attach import attach_plain
from engine.base import Base
from engine.errors import BadSetting
from tests.engine.test_methods import PROBE, config_for, create, disturb, kept, load, logits

PLAIN: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "lora": (Algorithm.LORA, {"dropout": 0.1}),
    "rslora": (Algorithm.RSLORA, {"alpha": 6}),
    "qlora": (Algorithm.QLORA, {}),
    "pissa": (Algorithm.PISSA, {}),
    "pissa rslora": (Algorithm.PISSA, {"use_rslora": True}),
    "pissa nf4": (Algorithm.PISSA, {"quantization": "nf4"}),
    "target subset": (Algorithm.LORA, {"target_modules": ["q_proj", "down_proj"]}),
}


def write_adapter(path: Path, config: PeftConfig, folder: Path, size: float = 0.05) -> Path:
    """Write an adapter as a run hands it out, on a base of its own."""
    base = load(path, config)
    folder.mkdir(parents=True)
    with kept(base, config, folder.parent):
        initial = create(base, config)
        disturb(base, size)
        state, lora = methods.adapter_state(base.model, "adp"), base.model.peft_config["adp"]
        if initial:
            state, lora = methods.as_plain_lora(state, initial, lora)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    return folder


def everything(base: Base) -> dict[str, Any]:
    """Everything about the model that attaching an adapter could change, tensors apart."""
    model = base.model
    return {
        "adapters": base.adapters,
        "active": list(model.active_adapters) if isinstance(model, PeftModel) else None,
        "training": {name: module.training for name, module in model.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "types": {name: (parameter.dtype, parameter.device) for name, parameter in model.named_parameters()},
        "scaling": {name: dict(m.scaling) for name, m in model.named_modules() if hasattr(m, "lora_A")},
        "layers": sorted(model.base_model.targeted_module_names) if isinstance(model, PeftModel) else None,
    }


def answers(base: Base, name: str) -> torch.Tensor:
    with base.using(name):
        return logits(base)


@pytest.mark.parametrize("variant", PLAIN)
@pytest.mark.parametrize("first", [True, False], ids=["on the bare base", "beside another"])
def test_a_plain_adapter_is_to_the_bit_what_pefts_loader_makes_of_it(
    tiny_path: Path, tmp_path: Path, variant: str, first: bool
) -> None:
    algorithm, overrides = PLAIN[variant]
    config = config_for(algorithm, **overrides)
    folder = write_adapter(tiny_path, config, tmp_path / "new" / "adp")
    other = write_adapter(tiny_path, config_for(Algorithm.LORA, rank=3), tmp_path / "old" / "adp", 0.1)

    base, stock = load(tiny_path, config), load(tiny_path, config)
    bare = logits(base)
    for name, path in ([] if first else [("other", other)]) + [("adp", folder)]:
        model = attach_plain(base.model, name, path)
        assert model is not None  # it did take the fast path
        base.model = model
        if isinstance(stock.model, PeftModel):
            stock.model.load_adapter(str(path), adapter_name=name, torch_device="cpu")
        else:
            stock.model = PeftModel.from_pretrained(stock.model, str(path), adapter_name=name, torch_device="cpu")

    assert everything(base) == everything(stock)
    found, expected = base.model.state_dict(), stock.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    for name in base.adapters:
        assert base.model.peft_config[name].inference_mode
        assert torch.equal(answers(base, name), answers(stock, name)) and not torch.equal(answers(base, name), bare)


def test_adapters_beside_each_other_answer_generate_and_come_off_as_if_alone(tiny_path: Path, tmp_path: Path) -> None:
    chosen = {
        "a": config_for(Algorithm.LORA),
        "b": config_for(Algorithm.RSLORA, rank=3),
        "c": config_for(Algorithm.LORA, target_modules=["v_proj"]),
        "d": config_for(Algorithm.PISSA),
    }
    folders = {name: write_adapter(tiny_path, config, tmp_path / name / "adp", 0.1) for name, config in chosen.items()}
    base = load(tiny_path, chosen["a"])
    bare = logits(base)
    alone = {}
    for name, folder in folders.items():
        base.attach(name, folder)
        alone[name] = (answers(base, name), written(base))
        base.detach(name)
        assert torch.equal(logits(base), bare)
    for name, folder in folders.items():
        base.attach(name, folder)
    for name in [*folders, *reversed(folders)]:
        assert torch.equal(answers(base, name), alone[name][0])
        assert torch.equal(written(base), alone[name][1])
    base.detach("a")
    base.detach("c")
    assert base.adapters == ["b", "d"] and torch.equal(answers(base, "d"), alone["d"][0])
    base.attach("c", folders["c"])
    assert torch.equal(answers(base, "c"), alone["c"][0]) and torch.equal(answers(base, "b"), alone["b"][0])


@pytest.mark.parametrize("algorithm", [Algorithm.LORA, Algorithm.DORA])
@pytest.mark.parametrize("active", [True, False])
def test_detaching_leaves_what_pefts_own_deletion_leaves(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, active: bool
) -> None:
    config = config_for(Algorithm.LORA)
    kept_one = write_adapter(tiny_path, config, tmp_path / "kept" / "adp")
    gone = write_adapter(tiny_path, config_for(algorithm, rank=2), tmp_path / "gone" / "adp")
    base, stock = load(tiny_path, config), load(tiny_path, config)
    for one in (base, stock):
        one.attach("kept", kept_one)
        one.attach("gone", gone)
        logits(one)
        one.using("gone" if active else "kept")
    base.detach("gone")
    stock.model.set_adapter("kept", inference_mode=True)
    stock.model.delete_adapter("gone")
    assert everything(base) == everything(stock)
    found, expected = base.model.state_dict(), stock.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits(base), logits(stock))


def test_detaching_an_adapter_in_training_leaves_nothing_trainable(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    base.attach("adp", write_adapter(tiny_path, config, tmp_path / "adp"))
    expected = answers(base, "adp")
    for trained in (config, config_for(Algorithm.DORA)):
        base.create("trained", methods.lora_config(trained, base.model, "tests/tiny", None))
        assert any(parameter.requires_grad for parameter in base.model.parameters())
        base.detach("trained")
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        base.model.eval()
        assert torch.equal(answers(base, "adp"), expected)


def written(base: Base) -> torch.Tensor:
    ids = PROBE[:1]
    found: torch.Tensor = base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    return found


def test_an_adapter_that_is_saved_again_is_the_file_that_it_came_from(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA, dropout=0.1)
    folder = write_adapter(tiny_path, config, tmp_path / "adp")
    base = load(tiny_path, config)
    base.attach("one", folder)
    base.attach("two", folder)
    base.model.save_pretrained(str(tmp_path / "again"), selected_adapters=["two"], save_embedding_layers=False)
    again = tmp_path / "again" / "two"
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (again, folder))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    texts = [json.loads((path / "adapter_config.json").read_text()) for path in (again, folder)]
    for text in texts:
        text["target_modules"].sort()
        text["inference_mode"] = True
    assert texts[0] == texts[1]


def test_an_adapter_in_training_stays_active_trainable_and_in_training(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA, dropout=0.1)
    folder = write_adapter(tiny_path, config, tmp_path / "adp")
    base = load(tiny_path, config)
    base.create("trained", methods.lora_config(config, base.model, "tests/tiny", None))
    base.model.train()
    before = everything(base)
    base.attach("adp", folder)
    after = everything(base)
    assert after["active"] == ["trained"] and all(after["training"].values())
    for name, is_trained in before["trained"].items():
        assert after["trained"][name] == is_trained
    assert not any(is_trained for name, is_trained in after["trained"].items() if name not in before["trained"])


def test_a_half_precision_file_is_widened(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    folder = write_adapter(tiny_path, config, tmp_path / "adp")
    state = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.to(torch.bfloat16) for key, value in state.items()}, folder / "adapter_model.safetensors")
    base = load(tiny_path, config)
    model = attach_plain(base.model, "adp", folder)
    assert model is not None
    found = methods.adapter_state(model, "adp")
    assert all(torch.equal(found[key], value.to(torch.bfloat16).float()) for key, value in state.items())


@pytest.mark.parametrize("alone", [True, False], ids=["on the bare base", "beside another"])
def test_a_device_without_room_for_the_tensors_leaves_no_trace(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    config = config_for(Algorithm.LORA)
    folder = write_adapter(tiny_path, config, tmp_path / "adp")
    base = load(tiny_path, config)
    if not alone:
        base.attach("other", folder)
    before, expected = everything(base), logits(base)
    with monkeypatch.context() as patch, pytest.raises(BadSetting, match="out of memory"):
        patch.setattr(module, "_fill", full)
        base.attach("adp", folder)
    assert everything(base) == before and torch.equal(logits(base), expected)
    base.attach("adp", folder)
    base.detach("other")
    assert torch.equal(answers(base, "adp"), expected) != alone


def _dora(tiny_path: Path, folder: Path) -> None:
    write_adapter(tiny_path, config_for(Algorithm.DORA), folder)


def _rank_pattern(tiny_path: Path, folder: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3})
    base = load(tiny_path, config_for(Algorithm.LORA))
    base.create("adp", config)
    disturb(base, 0.1)
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(methods.adapter_state(base.model, "adp"), folder / "adapter_model.safetensors")


@pytest.mark.parametrize("make", [_dora, _rank_pattern])
def test_what_is_not_plain_takes_pefts_path_and_works(
    tiny_path: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    make(tiny_path, tmp_path / "adp")
    config = config_for(Algorithm.LORA)
    base, stock = load(tiny_path, config), load(tiny_path, config)
    before = everything(base)
    assert attach_plain(base.model, "adp", tmp_path / "adp") is None and everything(base) == before
    base.attach("other", write_adapter(tiny_path, config, tmp_path / "other"))
    assert attach_plain(base.model, "adp", tmp_path / "adp") is None
    base.attach("adp", tmp_path / "adp")
    stock.model = PeftModel.from_pretrained(stock.model, str(tmp_path / "adp"), adapter_name="adp", torch_device="cpu")
    assert torch.equal(answers(base, "adp"), answers(stock, "adp"))


def _spoil(folder: Path, fault: str) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    last = sorted(state)[-1]
    if fault == "a shape":
        state[last] = state[last][..., :-1].contiguous()
    elif fault == "missing":
        del state[last]
    elif fault == "left over":
        state[last.replace("layers.1", "layers.7")] = state[last].clone()
    elif fault == "another rank":
        text = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(text | {"r": 9}))
    elif fault == "unknown layers":
        text = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(text | {"target_modules": ["qkv"]}))
    elif fault == "a layer no adapter fits":
        text = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(text | {"target_modules": ["q_proj", "self_attn"]}))
    save_file(state, file)
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-100])


FAULTS = ["a shape", "missing", "left over", "another rank", "unknown layers", "a layer no adapter fits", "cut off"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("alone", [True, False], ids=["on the bare base", "beside another"])
@pytest.mark.parametrize("algorithm", [Algorithm.LORA, Algorithm.DORA])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(
    tiny_path: Path, tmp_path: Path, fault: str, alone: bool, algorithm: Algorithm
) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    bare = logits(base)
    good = write_adapter(tiny_path, config_for(algorithm), tmp_path / "good" / "adp")
    if not alone:
        base.attach("other", write_adapter(tiny_path, config, tmp_path / "other" / "adp", 0.1))
        others = answers(base, "other")
    bad = write_adapter(tiny_path, config_for(algorithm), tmp_path / "bad" / "adp")
    _spoil(bad, fault)
    before, modules = everything(base), [name for name, _ in base.model.named_modules()]

    with pytest.raises(BadSetting, match="does not fit"):
        base.attach("adp", bad)
    assert everything(base) == before and [name for name, _ in base.model.named_modules()] == modules
    if alone:
        assert torch.equal(logits(base), bare)
    else:
        assert torch.equal(answers(base, "other"), others)

    base.attach("adp", good)  # the name is free again
    clean = load(tiny_path, config)
    clean.attach("adp", good)
    assert torch.equal(answers(base, "adp"), answers(clean, "adp"))
    if not alone:
        assert torch.equal(answers(base, "other"), others)
