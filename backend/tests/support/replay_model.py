"""The model that a replay trains, built by hand: how the base is stored, and where A, B and the frozen weight start.

In fp32 PEFT starts PiSSA and OLoRA. What it cannot do on a CPU, or does with more rounding (A and B to bf16 on a base
of that type, OLoRA from weights in 4 bits), is written here from the papers: QPiSSA and OLoRA on 4 bits and in bf16,
and LoftQ. Rounding to 4 bits is bitsandbytes'.
"""

import math
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.lora.dora import DoraLinearLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Dora(DoraLinearLayer):
    """PEFT's but for what docs/methods.md says of 16 bits: magnitudes in fp32, the base's output in its own type."""

    def update_layer(
        self, *, base_layer: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, **others: Any
    ) -> None:
        held = _held(base_layer) if isinstance(base_layer.weight, Params4bit) else base_layer.weight.detach().float()
        start = held + scaling * lora_B.detach().float() @ lora_A.detach().float()
        self.weight = torch.nn.Parameter(torch.linalg.norm(start, dim=1))

    def forward(self, x: torch.Tensor, *, base_layer: Any, base_result: Any = None, **others: Any) -> torch.Tensor:
        if base_result is None:
            own = base_layer.weight.dtype if base_layer.weight.is_floating_point() else x.dtype
            base_result = base_layer(x.to(own)).to(x.dtype)
        return super().forward(x, base_layer=base_layer, base_result=base_result, **others)


def build(path: Path, config: dict[str, Any]) -> PeftModelForCausalLM:
    """Load the base as it is to be stored and put the adapter on it."""
    dtype = DTYPES[config["precision"]]
    storage = None
    if config["quantization"] == "nf4":
        storage = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=storage)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # docs/decisions/0004-four-bit-on-cpu.md
            module.support_avx512bf16_for_cpu = False
    set_seed(config["seed"])
    start = config["init_weights"]
    by_hand = start == "loftq" or (start in ("pissa", "olora") and (storage is not None or dtype != torch.float32))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=config["dropout"],
        target_modules=config["target_modules"],
        use_rslora=config["use_rslora"],
        use_dora=config["use_dora"],
        init_lora_weights=True if by_hand or start == "default" else start,
    )
    variants.DoraLinearLayer = _Dora  # not an engine's, should one have been in this process
    model = PeftModelForCausalLM(base, lora)
    if by_hand:
        published = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32 if storage is not None else dtype)
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                weight = published.get_submodule(name.removeprefix("base_model.model.")).weight
                _start(module, weight.detach().float(), config)
    return model


def _start(layer: LoraLayer, weight: torch.Tensor, config: dict[str, Any]) -> None:
    """Set A and B on a layer, and store its weight less what is taken out of it.

    Sources: PiSSA (arXiv 2404.02948), section 4; OLoRA (arXiv 2406.01775), algorithm 1; LoftQ (arXiv 2310.08659),
    algorithm 1, whose first rounding is of the whole weight.
    """
    rank, linear = config["rank"], layer.get_base_layer()
    scaling = config["alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    if config["init_weights"] == "loftq":
        a, b = _principal(weight - _held(linear), rank, scaling)
        for _ in range(config["loftq_iterations"] - 1):
            _store(linear, weight - scaling * b @ a, config)
            a, b = _principal(weight - _held(linear), rank, scaling)
    elif config["init_weights"] == "pissa":
        a, b = _principal(weight, rank, scaling)
        _store(linear, weight - scaling * b @ a, config)
    else:
        q, r = torch.linalg.qr(weight)
        a, b = r[:rank], q[:, :rank]
        _store(linear, weight - scaling * b @ a, config)
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)


def _principal(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A = √(S/s)·Vᵀ and B = U·√(S/s) of the largest singular values, so that s·B·A is the best of its rank."""
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _held(linear: Any) -> torch.Tensor:
    return functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).detach().float()


def _store(linear: Any, weight: torch.Tensor, config: dict[str, Any]) -> None:
    """Put other numbers in place of a weight, in 4 bits as when a model is loaded in 4 bits."""
    typed = weight.to(DTYPES[config["precision"]])
    if config["quantization"] == "nf4":
        linear.weight = Params4bit(typed, quant_type="nf4", compress_statistics=True, module=linear).to("cpu")
    else:
        linear.weight.data.copy_(typed)
