"""From our configuration to PEFT's, and what PiSSA needs before and after a run."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from domain.peft_config import PeftConfig
from engine.errors import BadSetting

_INIT = {"default": True, "gaussian": "gaussian", "pissa": "pissa"}


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the layers an adapter can sit on: every linear one but the output head.

    Returns:
        Module path → (in features, out features).

    Source: the meaning of "all-linear" in PEFT (`tuners_utils._maybe_include_all_linear_layers`).
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):  # bitsandbytes' quantised layers are subclasses
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found


def targeted_layers(model: nn.Module, config: PeftConfig) -> dict[str, tuple[int, int]]:
    """Select the layers that the configuration adapts.

    Raises:
        BadSetting: A named target module is not in the model.
    """
    layers = linear_layers(model)
    if config.target_modules == "all-linear":
        return layers
    missing = [
        name for name in config.target_modules if not any(path == name or path.endswith(f".{name}") for path in layers)
    ]
    if missing:
        known = sorted({path.rsplit(".", 1)[-1] for path in layers})
        raise BadSetting(f"target_modules: the model has no linear layer named {', '.join(missing)}; it has {known}")
    return {
        path: shape
        for path, shape in layers.items()
        if any(path == name or path.endswith(f".{name}") for name in config.target_modules)
    }


def trainable_parameters(layers: dict[str, tuple[int, int]], config: PeftConfig) -> int:
    """Count what an adapter of this configuration trains: r·(in + out) a layer, and out magnitudes for DoRA."""
    return sum(
        config.rank * (fan_in + fan_out) + (fan_out if config.use_dora else 0) for fan_in, fan_out in layers.values()
    )


def lora_config(config: PeftConfig, base_model_id: str, revision: str | None) -> LoraConfig:
    """Write the configuration in PEFT's terms; nothing is left to its defaults that we let a client set."""
    targets = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=_INIT[config.init_weights],
        base_model_name_or_path=base_model_id,
        revision=revision,
    )


@contextmanager
def original_weights_kept(model: nn.Module, config: PeftConfig, scratch: Path) -> Iterator[None]:
    """Give the base its own weights back after a PiSSA run, to the bit.

    PiSSA freezes W − s·B₀A₀ in place of W, which would be wrong for every other adapter on the base. Adding
    the product back rounds; the originals are kept on disk instead (one file a layer, so that memory holds
    one layer at a time), and copied back however the run ends.
    """
    if config.init_weights != "pissa":
        yield
        return
    paths = list(targeted_layers(_unwrapped(model), config))
    with tempfile.TemporaryDirectory(dir=scratch, prefix="pissa-") as folder:
        files = {path: Path(folder) / f"{number}.safetensors" for number, path in enumerate(paths)}
        for path, file in files.items():
            weight = _base_layer(model, path).weight
            save_file({"weight": weight.detach().cpu().contiguous()}, file)
        try:
            yield
        finally:
            with torch.no_grad():
                for path, file in files.items():
                    weight = _base_layer(model, path).weight
                    weight.copy_(load_file(file)["weight"].to(weight.device))


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _base_layer(model: nn.Module, path: str) -> nn.Module:
    layer = _unwrapped(model).get_submodule(path)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def adapter_state(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names that PEFT saves them by, on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def subtract_initial(model: PeftModel, adapter: str, initial: dict[str, torch.Tensor]) -> None:
    """Freeze W − s·B₀A₀ in place of each W, as PEFT's PiSSA initialisation does, from A₀ and B₀ kept before.

    The arithmetic is PEFT's (`LoraLayer.pissa_init`), in the same order and type, so that the bits are the same.
    """
    for name, a in initial.items():
        path, marker, _ = name.partition(".lora_A.")
        if not marker:
            continue
        layer = model.get_submodule(path)
        base = layer.get_base_layer()
        if not isinstance(layer, LoraLayer) or not isinstance(base, nn.Module):
            raise BadSetting(f"{path} carries no adapter")
        weight = base.weight
        b = initial[f"{path}.lora_B.weight"].to(weight.device)
        full = transpose(weight.data.to(torch.float32), layer.fan_in_fan_out)
        full = full - layer.scaling[adapter] * b @ a.to(weight.device)
        weight.data = transpose(full.to(weight.dtype), layer.fan_in_fan_out)


def as_plain_lora(
    trained: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Rewrite a PiSSA adapter so that it works on the unmodified base.

    The trained model is W − s·B₀A₀ + s·BA; with A' = [A; A₀] (2r × in) and B' = [B, −B₀] (out × 2r) the
    plain LoRA s·B'A' on W says the same. Scaling stays s: alpha doubles with the rank, and with rsLoRA,
    whose s' = 2·alpha/√(2r) = √2·s, the factor goes into B'.

    Args:
        trained: The adapter's tensors after training, A as (r, in) and B as (out, r).
        initial: The same tensors as initialised.
        config: The adapter's configuration.

    Source: PiSSA (arXiv 2404.02948), appendix on converting to LoRA.
    """
    rank, alpha = 2 * config.r, 2 * config.lora_alpha
    factor = 1 / math.sqrt(2) if config.use_rslora else 1.0
    state = {}
    for name, tensor in trained.items():
        if ".lora_A." in name:
            state[name] = torch.cat([tensor, initial[name]], dim=0).contiguous()
        else:
            state[name] = (torch.cat([tensor, -initial[name]], dim=1) * factor).contiguous()
    values = config.to_dict() | {"r": rank, "lora_alpha": alpha, "init_lora_weights": True}
    return state, LoraConfig.from_peft_type(**values)
