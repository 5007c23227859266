"""Without a GPU: what we pass to Unsloth, and what we rely on in it, is what the installed Unsloth takes and does.

Unsloth is imported in a process of its own: it patches transformers and PEFT, and writes code where it is told to.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from domain.memory.activations import Batch
from domain.memory.unsloth import host_bytes, logits_bytes
from domain.peft.algorithms import Algorithm
from domain.peft.unsloth_rules import FAST_FAMILIES, MEASURED_FAMILIES, loaded_length, not_fused, obstacle
from engine.batches import pack, pad
from engine.rows import Row
from engine.unsloth_backend import FusedLoss, forward_arguments, load_arguments, packed_lengths
from services.models.embedded import CONFIG
from tests.engine.test_methods import config_for
from tests.support.server import BACKEND
from tests.support.shapes import shape_of

SCRIPT = """
import inspect, json
from engine.guards import hide_broken_torchvision
hide_broken_torchvision()
import unsloth
from unsloth import FastLanguageModel
from unsloth.kernels import fast_lora
from unsloth.models import _utils, llama, loader
from transformers import PreTrainedModel
from unsloth.kernels import rms_layernorm
from unsloth_zoo import gradient_checkpointing
from unsloth_zoo.fused_losses import cross_entropy_loss

def parameters(function):
    return {name: parameter.kind.name for name, parameter in inspect.signature(function).parameters.items()}

print(json.dumps({
    "from_pretrained": parameters(FastLanguageModel.from_pretrained),
    "fast_from_pretrained": parameters(llama.FastLlamaModel.from_pretrained),
    "transformers": parameters(PreTrainedModel.from_pretrained),
    "patch_peft_model": parameters(FastLanguageModel.patch_peft_model),
    "for_training": parameters(FastLanguageModel.for_training),
    "for_inference": parameters(FastLanguageModel.for_inference),
    "checkpointing": parameters(_utils.apply_unsloth_gradient_checkpointing),
    "forward": parameters(llama.CausalLM_fast_forward(None)),
    "peft_forward": parameters(llama.PeftModel_fast_forward),
    "loader_source": inspect.getsource(loader.FastLanguageModel.from_pretrained),
    "patch_source": inspect.getsource(llama.FastLlamaModel.patch_peft_model),
    "forward_source": inspect.getsource(llama.CausalLM_fast_forward),
    "backbone_source": inspect.getsource(llama.LlamaModel_fast_forward),
    "attention_source": inspect.getsource(llama.LlamaAttention_fast_forward),
    "chunks": {
        length: cross_entropy_loss.get_chunk_size(2, length, 128256, 4.0, 2 * length * 2048 * 2 / 2**30)
        for length in (64, 1024, 1046, 1060, 2048, 4096, 32768)
    },
    "most_gib": cross_entropy_loss._CE_TARGET_GB_CAP,
    "first_buffers": [
        gradient_checkpointing.INITIAL_CPU_BUFFER_COUNT, gradient_checkpointing.INITIAL_CPU_BUFFER_SIZE
    ],
    "pinned": [gradient_checkpointing._pinned_block_bytes(size) for size in (2**24, 2**24 + 1)],
    "initialize_source": inspect.getsource(gradient_checkpointing.initialize_unsloth_gradient_checkpointing),
    "checkpoint_source": inspect.getsource(gradient_checkpointing.UnslothCheckpointFunction.forward),
    "kept_source": [inspect.getsource(function.forward) for function in (
        fast_lora.LoRA_MLP, fast_lora.LoRA_QKV, fast_lora.LoRA_W, rms_layernorm.Fast_RMS_Layernorm
    )],
    "checkpointing_source": inspect.getsource(_utils.apply_unsloth_gradient_checkpointing),
    "dropout_is_fused": fast_lora.FUSED_LORA_DROPOUT,
    "dora_leaves_the_kernels": [
        "_has_active_dora_adapter" in inspect.getsource(function)
        for function in (fast_lora.apply_lora_mlp_swiglu, fast_lora.apply_lora_qkv, fast_lora.apply_lora_o)
    ],
}))
"""


@pytest.fixture(scope="module")
def unsloth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Signatures and sources of the installed Unsloth."""
    work = tmp_path_factory.mktemp("unsloth")
    environment = os.environ | {
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_SKIP_TORCHVISION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(work / "compiled"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTHONPATH": str(BACKEND),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _named(parameters: dict[str, str]) -> set[str]:
    return {name for name, kind in parameters.items() if not kind.startswith("VAR_")}


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_load_argument_ends_where_it_is_named(unsloth: dict[str, Any], algorithm: Algorithm) -> None:
    arguments = load_arguments(Path("model"), config_for(algorithm), "cuda:0")
    extra = set(arguments) - _named(unsloth["from_pretrained"])
    # What is left goes through its **kwargs: on to the layers' own loader, and from there to transformers by name.
    assert extra <= _named(unsloth["transformers"])
    assert "VAR_KEYWORD" in unsloth["fast_from_pretrained"].values()
    assert extra == {"local_files_only", "use_safetensors"}
    assert arguments["load_in_4bit"] == (algorithm in (Algorithm.QLORA, Algorithm.LOFTQ)) != arguments["load_in_16bit"]


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_misspelled_argument_would_be_found(unsloth: dict[str, Any], algorithm: Algorithm) -> None:
    arguments = load_arguments(Path("model"), config_for(algorithm), "cuda:0") | {"load_in_4bits": True}
    known = _named(unsloth["from_pretrained"]) | _named(unsloth["transformers"])
    assert set(arguments) - known == {"load_in_4bits"}


def test_the_calls_around_a_run_are_in_the_signatures(unsloth: dict[str, Any]) -> None:
    assert {"model", "use_gradient_checkpointing"} <= _named(unsloth["patch_peft_model"])
    assert {"model", "use_gradient_checkpointing"} <= _named(unsloth["for_training"])
    assert "model" in _named(unsloth["for_inference"])
    assert list(unsloth["checkpointing"]) == ["use_gradient_checkpointing", "max_seq_length", "dtype"]


def _batches() -> list[Any]:
    rows = [Row(0, [5, 6, 7], [-100, 6, 7], False), Row(1, [8, 9], [-100, 9], False), Row(2, [3], [-100], False)]
    return [pad(rows, 0), pack([rows[:2], rows[2:]], 0)]


def test_the_forward_pass_reads_every_argument_that_a_batch_gives(unsloth: dict[str, Any]) -> None:
    cpu = torch.device("cpu")
    given = {name for batch in _batches() for name in forward_arguments(batch, cpu)}
    assert "VAR_KEYWORD" in unsloth["peft_forward"].values()  # the wrapper hands on what it does not name
    by_keyword = given - _named(unsloth["forward"])
    assert by_keyword == {"num_items_in_batch", "packed_seq_lengths"}
    for name in by_keyword:
        assert f'kwargs.get("{name}"' in unsloth["forward_source"]
    assert "get_packed_info_from_kwargs(kwargs" in unsloth["attention_source"]
    # Columns as a tensor, which transformers takes for the head, would be taken for none.
    assert "isinstance(logits_to_keep, torch.Tensor)" in unsloth["forward_source"]


def test_packed_rows_are_one_sequence_with_their_lengths() -> None:
    packed = _batches()[1]
    assert packed_lengths(packed.position_ids).tolist() == [3, 2, 1, 4]  # with the padding as a row of its own
    given = forward_arguments(packed, torch.device("cpu"))
    assert given["input_ids"].shape == given["labels"].shape == given["position_ids"].shape == (1, 10)
    assert int(given["packed_seq_lengths"].sum()) == 10
    starts = torch.cumsum(given["packed_seq_lengths"], 0)[:-1]
    assert (given["labels"][0, starts] == -100).all()  # no row's first token is learned from the row before it


def test_the_loss_is_the_sum_over_the_trained_tokens() -> None:
    class Model:
        """Computes as Unsloth's fused loss says it does: the sum over the items that it is told of."""

        def __call__(self, **given: Any) -> Any:
            table = torch.arange(100.0).reshape(10, 10).sin()
            logits, labels = table[given["input_ids"]][:, :-1], given["labels"][:, 1:]
            total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            return type("Output", (), {"loss": total / given["num_items_in_batch"]})

    loss = FusedLoss(Model(), torch.device("cpu"))
    padded, packed = (float(loss(batch).total) for batch in _batches())
    assert padded == pytest.approx(packed)


def test_the_families_that_are_sent_there_have_layers_of_their_own(unsloth: dict[str, Any]) -> None:
    for family in FAST_FAMILIES:
        assert f'model_type == "{family}"' in unsloth["loader_source"], family
        assert f'model_type == "{family}"' in unsloth["patch_source"], family
    dispatched = set(re.findall(r'if model_type == "(\w+)":', unsloth["loader_source"]))
    assert dispatched == FAST_FAMILIES | {"gemma2"}  # no other family has layers of its own
    assert MEASURED_FAMILIES <= FAST_FAMILIES
    # The mixture of experts has a name in the loader's remarks and none where adapters are fused.
    assert 'model_type == "qwen3_moe"' not in unsloth["patch_source"]


def test_the_loss_takes_as_many_chunks_as_the_estimate_counts(unsloth: dict[str, Any]) -> None:
    shape = replace(shape_of(CONFIG), vocab=128256, hidden=2048)
    config = config_for(Algorithm.LORA, precision="bf16")
    assert unsloth["most_gib"] == 4.0
    for length, count in unsloth["chunks"].items():
        batch = Batch(2, int(length), masked=False, even=True)
        logits = logits_bytes(shape, config, batch) - 2 * batch.tokens * 2048 * 2
        assert logits == math.ceil(batch.tokens / count) * 128256 * 8, length
        assert logits_bytes(shape, config, replace(batch, even=False)) >= logits_bytes(shape, config, batch)


def test_what_is_kept_and_moved_is_what_the_estimate_counts(unsloth: dict[str, Any]) -> None:
    count, elements = unsloth["first_buffers"]
    shape = shape_of(CONFIG)
    little = Batch(1, 8, masked=False)
    config = config_for(Algorithm.LORA, precision="bf16").model_copy(update={"gradient_checkpointing": True})
    assert host_bytes(shape, config, little) == count * elements * 2
    assert unsloth["pinned"] == [2**24, 2**25]
    assert "MINIMUM_SIZE = 2 * 1024 * 1024" in unsloth["initialize_source"]
    assert "(CURRENT_GC_INDEX != LAST_GC_INDEX) or FIRST_PASS" in unsloth["checkpoint_source"]
    assert "max_seq_length < 512" in unsloth["checkpointing_source"]
    mlp, qkv, out, norm = unsloth["kept_source"]
    assert "save_for_backward(gateA, gateB, upA, upB, downA, downB, X, e, g, *masks)" in mlp
    assert "*masks" in qkv and "save_for_backward(A, B, X, mask)" in out
    assert "save_for_backward(Y if ctx.FROM_Y else X, W, r)" in norm


def test_what_unsloth_does_quietly_is_as_the_rules_say(unsloth: dict[str, Any]) -> None:
    assert "if load_in_8bit or full_finetuning" in unsloth["loader_source"]  # handed to the generic path
    assert "float32_base" in unsloth["patch_source"]  # 32-bit bases are not fused
    assert "input_ids[:, : self.max_seq_length]" in unsloth["backbone_source"]  # cut without an error
    assert unsloth["dropout_is_fused"] is True  # dropout takes effect in the kernels
    assert unsloth["dora_leaves_the_kernels"] == [True, True, True]


@pytest.mark.parametrize("algorithm", Algorithm)
def test_routing_says_why(algorithm: Algorithm) -> None:
    config = config_for(algorithm, precision="bf16")
    assert obstacle(config, "llama") is None
    assert "family" in str(obstacle(config, "phi3")) and "family" in str(obstacle(config, None))
    assert "fused" in str(obstacle(config_for(algorithm, precision="fp32"), "qwen2"))
    assert (not_fused(config) is None) == (algorithm is not Algorithm.DORA)
    assert loaded_length(config, 131072) == max(2048, config.max_seq_length)
    assert loaded_length(config, 1024) == 1024  # never stretched


def test_8_bit_bases_are_not_sent_there() -> None:
    config = config_for(Algorithm.LORA, precision="bf16").model_copy(update={"quantization": "int8"})
    assert "8-bit" in str(obstacle(config, "llama"))


PATCHED = """
import json, sys
from pathlib import Path
from engine.guards import hide_broken_torchvision
hide_broken_torchvision()
import unsloth
import torch
from peft import LoraConfig, PeftModelForCausalLM
from tests.engine.test_methods import config_for
from tests.support.tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, Trainer
from domain.peft.algorithms import Algorithm
from engine.unsloth_backend import UnslothBackend

def _fast_inner_training_loop(self):
    raise AssertionError("it is looked for by name when adapters are patched; only a load on a GPU puts it there")

Trainer._inner_training_loop = _fast_inner_training_loop
folder = Path("model")
make_tiny_model(folder)
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
base.max_seq_length = 256  # as a load through Unsloth leaves it
ids = torch.tensor([[5, 6, 7, 8]])

def logits(model):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits

def trained(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)

def fused():
    layer = base.model.layers[0]
    return ["forward" in layer.mlp.__dict__, "apply_qkv" in layer.self_attn.__dict__]

plain = logits(base)
settings = dict(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
model = PeftModelForCausalLM(base, LoraConfig(**settings), adapter_name="one")
with_one = logits(model.eval())
found = {}
for algorithm in (Algorithm.LORA, Algorithm.DORA):
    model.add_adapter("two", LoraConfig(**settings, use_dora=algorithm is Algorithm.DORA))
    model.set_adapter("two")
    before, backend = trained(model), UnslothBackend()
    config = config_for(algorithm, precision="bf16", gradient_checkpointing=True)
    how = backend.begin_training(model, config)
    during = {"how": how, "fused": fused(), "same": trained(model) == before, "training": base.training,
              "recomputes": base.model.layers[0].gradient_checkpointing}
    backend.end_training(model, config)
    model.delete_adapter("two")
    model.set_adapter("one")
    after = {"fused": fused(), "training": base.training, "one": torch.equal(logits(model), with_one)}
    found[algorithm] = {"during": during, "after": after}
found["bare"] = torch.equal(logits(model.unload()), plain)
print(json.dumps(found))
"""


def test_unsloths_patches_are_on_for_the_run_and_gone_after_it(tmp_path: Path) -> None:
    """Its real `patch_peft_model` and its switches, on a CPU: what is patched can be seen there, not run."""
    environment = os.environ | {
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_SKIP_TORCHVISION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTHONPATH": str(BACKEND),
    }
    done = subprocess.run(
        [sys.executable, "-c", PATCHED], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "fused kernels: 6 of 6" in found["lora"]["during"]["how"]
    assert "DoRA" in found["dora"]["during"]["how"] and "PEFT's own layers" in found["dora"]["during"]["how"]
    assert found["lora"]["during"]["fused"] == [True, True]
    for algorithm in ("lora", "dora"):
        during, after = found[algorithm]["during"], found[algorithm]["after"]
        assert during["same"] and during["training"] and during["recomputes"]
        assert after == {"fused": [False, False], "training": False, "one": True}
    assert found["bare"] is True
