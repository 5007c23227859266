"""An export with a fault in it is found, whatever the fault, and one that is right is not accused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.small_models import make_small
from gguf import GGUFWriter
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from domain.exports import ExportCheck
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.protocol import CheckExport, Progress
from engine import export_check, merged_weights
from engine.channel import Stopped
from engine.errors import BadModel, ExportDiffers
from engine.export_check import TOLERANCES, check_export, distance
from engine.merged_weights import MergedWeights
from engine.stock_model import ExpectedTensor
from engine.tensor_difference import difference
from tests.engine.test_gguf_export import make_base
from tests.engine.test_gguf_export import run as run_gguf
from tests.engine.test_merge import make_adapter, run
from tests.engine.test_methods import config_for, load
from tests.support.stock_adapters import make_random_adapter
from tests.support.training_command import TestChannel

# PEFT warns of the patterns that it writes itself for parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
LORA = config_for(Algorithm.LORA)
EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def check(
    base: Path, folder: Path, config: PeftConfig = LORA, gguf: str | None = None, channel: TestChannel | None = None
) -> ExportCheck:
    command = CheckExport(
        request_id="r",
        base_path=str(base),
        adapter_path=str(folder / "adapter"),
        export_path=str(folder / ("out" if gguf else "merged")),
        gguf_file=gguf,
        precision=config.precision,
        quantization=config.quantization,
        rounded_elsewhere=False,
    )
    return check_export(command, channel or TestChannel())


@pytest.fixture(scope="module")
def dense(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a right merge of the tiny Llama in bf16: `base`, `adapter` and `merged`."""
    return _merge("llama", tiny_path, tmp_path_factory.mktemp("dense"), {"target_modules": "all-linear"})


@pytest.fixture(scope="module")
def experts(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a Mixtral whose stacked experts are adapted."""
    return _merge("mixtral", tiny_path, tmp_path_factory.mktemp("experts"), EXPERTS)


def _merge(family: str, tiny_path: Path, folder: Path, settings: dict[str, Any]) -> Path:
    base = folder / "base"
    if family == "llama":
        AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.bfloat16).save_pretrained(base)
        AutoTokenizer.from_pretrained(tiny_path).save_pretrained(base)
    else:
        make_small(family, base, tiny_path, torch.bfloat16)
    make_random_adapter(base, folder / "adapter", **settings)
    run(load(base, LORA), folder, folder / "adapter")
    return folder


def change(folder: Path, act: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "merged/model.safetensors"
    tensors = load_file(file)
    act(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: _forget(tensors, name))


def _forget(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def one_number(name: str, factor: float = 1.02) -> Callable[[Path], None]:
    """Change one number of a tensor by two steps of bf16."""

    def act(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[flat.abs().argmax()] *= factor

    return lambda folder: change(folder, act)


def leave_out(name: str) -> Callable[[Path], None]:
    """Put the base's tensor in the place of the merged one."""

    def act(folder: Path) -> None:
        own = load_file(folder / "base/model.safetensors")[name]
        change(folder, lambda tensors: tensors.update({name: own}))

    return act


def swap(one: str, other: str) -> Callable[[Path], None]:
    def act(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return lambda folder: change(folder, act)


def stale_base(folder: Path) -> None:
    """Have the base's files change after the merge: another revision of it."""
    file = folder / "base/model.safetensors"
    tensors = {name: tensor * (1.01 if "norm" in name else 1) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def another_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.9.extra.weight": torch.zeros(2)}))


def other_config(folder: Path) -> None:
    file = folder / "merged/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


Q1 = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
DENSE_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a lost key": (lose(Q1), Q1),
    "a lost norm": (lose("model.norm.weight"), "model.norm.weight"),
    "a number of an adapted tensor": (one_number(Q1), Q1),
    "a number of another tensor": (one_number("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "a layer left out": (leave_out(Q1), Q1),
    "two layers swapped": (swap(Q1.replace("1", "0"), Q1), Q1.replace("1", "0")),
    "a stale base": (stale_base, "model.layers.0.input_layernorm.weight"),
    "a tensor of another model": (another_tensor, "model.layers.9.extra.weight"),
    "another config": (other_config, "rms_norm_eps"),
}
EXPERT_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an expert left out": (leave_out(EXPERT), EXPERT),
    "an expert lost": (lose(EXPERT), EXPERT),
    "two experts swapped": (swap(EXPERT.replace("2.w2", "1.w2"), EXPERT), EXPERT.replace("2.w2", "1.w2")),
    "gate and up swapped": (swap(EXPERT.replace("w2", "w1"), EXPERT.replace("w2", "w3")), EXPERT.replace("w2", "w1")),
}


@pytest.mark.parametrize("fault", DENSE_FAULTS)
def test_a_fault_in_a_merged_model_is_found_and_the_first_tensor_named(dense: Path, tmp_path: Path, fault: str) -> None:
    _expect(dense, tmp_path, *DENSE_FAULTS[fault])


@pytest.mark.parametrize("fault", EXPERT_FAULTS)
def test_a_fault_in_stacked_experts_is_found_and_the_first_tensor_named(
    experts: Path, tmp_path: Path, fault: str
) -> None:
    _expect(experts, tmp_path, *EXPERT_FAULTS[fault])


def _expect(right: Path, tmp_path: Path, seed: Callable[[Path], None], named: str) -> None:
    folder = shutil.copytree(right, tmp_path / "wrong")
    seed(folder)
    with pytest.raises(ExportDiffers) as caught:
        check(folder / "base", folder)
    assert named in caught.value.message


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_right_export_is_not_accused(request: pytest.FixtureRequest, kind: str) -> None:
    folder: Path = request.getfixturevalue(kind)
    channel = TestChannel()
    found = check(folder / "base", folder, channel=channel)
    assert found.tensors == len(load_file(folder / "merged/model.safetensors"))
    assert (found.prompts, found.notes) == (5, []) and found.tokens > 100
    assert found.difference is not None and 0 < found.difference < found.tolerance == TOLERANCES["bfloat16"]
    progress = [event for event in channel.events if isinstance(event, Progress)]
    fractions = [event.fraction or 0.0 for event in progress]
    assert {event.stage for event in progress} == {"checking"}
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_method_is_checked_on_its_own_base(tiny_path: Path, tmp_path: Path, algorithm: Algorithm) -> None:
    """A base in 4 bits is compared as it was rounded."""
    config = config_for(algorithm)
    base = load(tiny_path, config)
    make_adapter(base, config, tmp_path / "adapter")
    run(base, tmp_path, tmp_path / "adapter")
    found = check(tiny_path, tmp_path, config)
    assert found.difference is not None and found.difference <= TOLERANCES["float32"]
    leave_q1_out = leave_out(Q1)
    shutil.copytree(tiny_path, tmp_path / "base")
    leave_q1_out(tmp_path)
    with pytest.raises(ExportDiffers, match=r"layers\.1\.self_attn\.q_proj"):
        check(tiny_path, tmp_path, config)


# Faults of what writes: the merge itself computes something else.


def _scaled(adapter: str, by: float) -> Callable[..., torch.Tensor]:
    def wrong(layer: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
        layer.scaling[adapter] *= by
        try:
            return RIGHT(layer, name, weight)
        finally:
            layer.scaling[adapter] /= by

    return wrong


def _without_third_expert(layer: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    merged = RIGHT(layer, name, weight)
    if isinstance(layer, ParamWrapper):
        merged[2] = weight[2]
    return merged


def _without_stacks(layer: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight if isinstance(layer, ParamWrapper) else RIGHT(layer, name, weight)


RIGHT = merged_weights.corrected
WRITERS = {
    "a scaling without its root": (_scaled("adp", 0.5), "self_attn.q_proj"),
    "a scaling off by a twentieth": (_scaled("adp", 1.05), "self_attn.q_proj"),
    "an expert left out": (_without_third_expert, "experts.2.w"),
    "all experts left out": (_without_stacks, "experts.0.w"),
}


@pytest.mark.parametrize("fault", WRITERS)
def test_a_fault_of_what_merges_is_found(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    wrong, named = WRITERS[fault]
    shutil.copytree(experts / "adapter", tmp_path / "adapter")
    with monkeypatch.context() as patched:
        patched.setattr(merged_weights, "corrected", wrong)
        run(load(experts / "base", LORA), tmp_path, tmp_path / "adapter")
    with pytest.raises(ExportDiffers) as caught:
        check(experts / "base", tmp_path)
    assert named in caught.value.message and "model.layers.0" in caught.value.message


def test_tied_embeddings_are_checked_as_they_are_written(tiny_path: Path, tmp_path: Path) -> None:
    """Written once; or twice, where the adapter changes one of them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.config.tie_word_embeddings = True
    tied = type(model)(model.config)
    tied.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path / "base")
    make_random_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    run(load(tmp_path / "base", LORA), tmp_path, tmp_path / "adapter")
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")
    assert check(tmp_path / "base", tmp_path).tensors == 20
    shutil.rmtree(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, of an adapter on a tied head
        make_random_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
        run(load(tmp_path / "base", LORA), tmp_path, tmp_path / "adapter")
        assert check(tmp_path / "base", tmp_path).tensors == 21
        lose("lm_head.weight")(tmp_path)
        with pytest.raises(ExportDiffers, match="lm_head"):
            check(tmp_path / "base", tmp_path)


# GGUF


@pytest.mark.parametrize("quantization", ["f32", "f16", "bf16", "q8_0"])
def test_a_gguf_file_is_checked_and_a_fault_in_it_found(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    base = load(tiny_path, LORA)
    make_adapter(base, LORA, tmp_path / "adapter")
    made = run_gguf(base, tmp_path, quantization)
    found = check(tiny_path, tmp_path, gguf=made.filename)
    assert found.tensors == 21 and found.difference is not None and found.difference <= found.tolerance

    compute = MergedWeights.compute

    def without_v(self: MergedWeights, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name == "model.layers.1.self_attn.v_proj.weight":
            return self.tensors[name].host.weight.detach().to(dtype or torch.float32)
        return compute(self, name, dtype)

    monkeypatch.setattr(MergedWeights, "compute", without_v)
    run_gguf(base, tmp_path, quantization)
    with pytest.raises(ExportDiffers, match=r"blk\.1\.attn_v\.weight"):
        check(tiny_path, tmp_path, gguf=made.filename)


def test_a_gguf_that_transformers_reads_otherwise_is_found(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor is there, but the file says another base of the positions' angles."""
    base = load(make_base(tiny_path, tmp_path / "base", "qwen2"), LORA)
    make_adapter(base, LORA, tmp_path / "adapter")
    made = run_gguf(base, tmp_path, "f32")
    assert check(tmp_path / "base", tmp_path, gguf=made.filename).notes == []
    describe = GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(GGUFWriter, "add_rope_freq_base", lambda self, _: describe(self, 3.0))
    run_gguf(base, tmp_path, "f32")
    with pytest.raises(ExportDiffers, match="no tensor differs"):
        check(tmp_path / "base", tmp_path, gguf=made.filename)


def test_a_gguf_that_does_not_fit_the_memory_is_compared_tensor_by_tensor(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(tiny_path, LORA)
    make_adapter(base, LORA, tmp_path / "adapter")
    made = run_gguf(base, tmp_path, "f16")
    monkeypatch.setattr(export_check, "_READER_BYTES_A_NUMBER", 2**50)
    found = check(tiny_path, tmp_path, gguf=made.filename)
    assert (found.tensors, found.difference) == (21, None) and "reader of GGUF" in found.notes[0]


# The rest


def test_an_export_that_stock_transformers_cannot_load_is_said_to_be(dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "wrong")
    (folder / "merged/tokenizer.json").write_text("{")
    with pytest.raises(BadModel, match="tokenizer"):
        check(folder / "base", folder)
    shutil.copyfile(dense / "merged/tokenizer.json", folder / "merged/tokenizer.json")
    config = json.loads((folder / "merged/config.json").read_text())
    (folder / "merged/config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises((BadModel, ExportDiffers)):
        check(folder / "base", folder)


def test_a_check_is_stopped_wherever_it_is(dense: Path) -> None:
    channel = TestChannel()
    check(dense / "base", dense, channel=channel)
    for look in range(1, channel.looks + 1, 7):
        with pytest.raises(Stopped):
            check(dense / "base", dense, channel=TestChannel(stop_at=look, mode="discard"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_may_be_off_by_half_a_step_and_no_more(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = 0.1 * torch.randn(64, 64, generator=generator)
    expected = ExpectedTensor(wanted, corrected=True, scale=0.4)
    rounded = wanted.to(dtype)
    assert difference(rounded, expected) == ""
    wrong = rounded.clone()
    wrong[3, 5] += max(2 * torch.finfo(dtype).eps * abs(float(wanted[3, 5])), 5e-6)
    assert "differs in 1 of 4096" in difference(wrong, expected) and "[3, 5]" in difference(wrong, expected)
    wrong[3, 5] = float("nan")
    assert "nan instead of" in difference(wrong, expected)
    assert "has the shape" in difference(rounded.T[:3], expected)
    untouched = ExpectedTensor(rounded, corrected=False, scale=0.0)
    assert difference(rounded, untouched) == "" != difference(-rounded, untouched)


def test_answers_that_are_not_finite_are_no_answers() -> None:
    right = [torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]])]
    assert distance(right, right) == 0.0
    assert distance([right[0] * torch.nan], right) == float("inf")
    assert distance(right, [right[0] * torch.nan]) is None
    assert distance([-right[0]], right) == pytest.approx(2.0)
