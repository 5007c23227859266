"""Loads adapters from their files onto a base.

PEFT's loader walks every module of the model a dozen times, and initialises weights that the file then replaces. A
plain LoRA needs none of that: it is put straight into the layers. PEFT loads any other adapter, or says what is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.initialization import no_init_weights

from engine.frozen_weights import unwrapped

# The settings that a plain adapter may have. update_layer reads the first five. The others change nothing in an adapter
# that is loaded to answer. An adapter with any other setting that is not at its default goes to PEFT's loader.
_UNDERSTOOD = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
    "base_model_name_or_path", "revision", "peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode",
    "init_lora_weights", "fan_in_fan_out",
}  # fmt: skip
# The ways to initialise A and B that change neither the base's weights nor the forward pass.
_HARMLESS_INITS = (True, False, None, "gaussian")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The last steps of update_layer, which go through every adapter on the layer. There is nothing to move to a device yet.
# Activating the active adapters again would freeze one in training.
_LEFT_OUT = ("_move_adapter_to_device_of_base_layer", "set_adapter")
_PREFIX = "base_model.model."


def attach_plain(model: Any, name: str, path: Path) -> PeftModel | None:
    """Put a plain LoRA's tensors onto the base, in fp32 and frozen. Nothing else of the model changes.

    Args:
        model: The base, with adapters or without.
        name: What the adapter is to be called on it.
        path: The adapter's folder.

    Returns:
        The model with the adapter; None if this is not a plain LoRA that fits exactly, and then nothing has changed.

    Source: PEFT 0.21, the steps of `PeftModel.load_adapter` and `BaseTuner.inject_adapter` that a plain LoRA needs.
    """
    file = path / "adapter_model.safetensors"
    config = PeftConfig.from_pretrained(str(path))
    if not (file.is_file() and _plain(config) and _fits(model, config)):
        return None
    layers = _targeted(model, config)
    tensors = load_file(file)
    if layers is None or not _match(layers, tensors, config.r):
        return None
    config.inference_mode = True
    with _all_or_nothing(model, name), no_init_weights():  # memory that is not written to is not taken
        if isinstance(model, PeftModel):
            _make_places(model, name, config, layers)
            adapted = model
        else:
            was_training = model.training
            adapted = PeftModelForCausalLM(model, config, adapter_name=name, low_cpu_mem_usage=True).train(was_training)
        _fill({key: unwrapped(adapted).get_submodule(key) for key in layers}, name, tensors)
    return adapted


def detach_plain(model: PeftModel, name: str) -> bool:
    """Take a plain LoRA that is not active off a model that has others. Nothing else of the model changes.

    Returns:
        Whether it was a plain LoRA. If not, nothing has changed, and PEFT has to take it off.
    """
    if not _plain(model.peft_config[name]) or name in model.active_adapters:
        return False
    for _, module in _own_modules(unwrapped(model)):
        if isinstance(module, LoraLayer):
            module.delete_adapter(name)
    del model.peft_config[name]
    return True


def _plain(config: PeftConfig) -> bool:
    plain = LoraConfig()
    return (
        type(config) is LoraConfig
        and all(getattr(config, f.name) == getattr(plain, f.name) for f in fields(plain) if f.name not in _UNDERSTOOD)
        and isinstance(config.target_modules, set)
        and config.init_lora_weights in _HARMLESS_INITS
        and isinstance(config.r, int)
        and config.r > 0
    )


def _fits(model: Any, config: LoraConfig) -> bool:
    """Tell whether the names in the file are the names in the model."""
    bare = unwrapped(model)
    if isinstance(model, PeftModel):
        known = type(model) in (PeftModel, PeftModelForCausalLM) and type(model.base_model) is LoraModel
    else:
        known = config.task_type == "CAUSAL_LM"
    converted = get_checkpoint_conversion_mapping(getattr(bare.config, "model_type", None))
    return known and converted is None and not getattr(bare, "_checkpoint_conversion_mapping", None)


def _targeted(model: Any, config: LoraConfig) -> dict[str, Any] | None:
    """Find the layers that PEFT would adapt, by their paths in the base.

    Returns:
        None if there are none, if one is not a plain linear layer, or if only some of them can hold adapters.
    """
    bare, adapted = unwrapped(model), isinstance(model, PeftModel)
    head = bare.get_output_embeddings()
    layers = {}
    for key, module in _own_modules(bare):
        if not check_target_module_exists(config, key):
            continue
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        ready = isinstance(module, LoraLayer) and type(module).update_layer is LoraLayer.update_layer
        if layer is head or not isinstance(layer, nn.Linear) or ready != adapted:
            return None
        weight = layer.weight
        if weight.dtype.is_floating_point and weight.dtype not in _FLOATS:
            return None  # PEFT gives A and B other types than fp32 there
        layers[key] = module
    return layers or None


def _own_modules(bare: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a base's modules in their order, adapted layers included, without the parts of adapted layers."""
    waiting = list(bare.named_children())[::-1]
    while waiting:
        key, module = waiting.pop()
        yield key, module
        if not isinstance(module, BaseTunerLayer):
            waiting += [(f"{key}.{name}", child) for name, child in module.named_children()][::-1]


def _match(layers: dict[str, Any], tensors: dict[str, torch.Tensor], rank: int) -> bool:
    """Tell whether the file holds exactly A and B of each layer, in the layer's shape."""
    wanted = {}
    for key, layer in layers.items():
        wanted[f"{_PREFIX}{key}.lora_A.weight"] = (rank, layer.in_features)
        wanted[f"{_PREFIX}{key}.lora_B.weight"] = (layer.out_features, rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes == wanted and all(tensor.dtype in _FLOATS for tensor in tensors.values())


def _make_places(model: PeftModel, name: str, config: LoraConfig, layers: dict[str, Any]) -> None:
    """Register the adapter with the model, and give each layer a place for A and B."""
    empty = LoraConfig(**{key: getattr(config, key) for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")})
    empty.init_lora_weights, empty.inference_mode = False, True
    model.peft_config[name] = config
    for key, layer in layers.items():
        layer.__dict__ |= dict.fromkeys(_LEFT_OUT, _nothing)
        try:
            layer.update_layer(name, config.r, lora_alpha=config.lora_alpha, config=empty, target_name=key)
        finally:
            for step in _LEFT_OUT:
                del layer.__dict__[step]


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, in place of a step that is left out."""


def _fill(layers: dict[str, Any], name: str, tensors: dict[str, torch.Tensor]) -> None:
    for key, layer in layers.items():
        device = layer.get_base_layer().weight.device
        for part, places in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            # A copy: the file is mapped into memory, and may be written over while the adapter answers; and products
            # round as with PEFT's tensors only where those start at the same multiples of bytes.
            weight = tensors[f"{_PREFIX}{key}.{part}.weight"].to(device, torch.float32, copy=True)
            places[name].weight = nn.Parameter(weight, requires_grad=False)
        for places in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            places[name].train(layer.training)


def attach_by_peft(model: Any, name: str, path: Path, device: str) -> PeftModel:
    """Load an adapter with PEFT, and refuse missing and superfluous tensors, which PEFT would ignore.

    Args:
        model: The base, with adapters or without. It stays as it was if this fails.
        name: The adapter's name on the base.
        path: The adapter's folder.
        device: Where PEFT reads the tensors to. By itself it would take the first GPU.

    Raises:
        ValueError: The adapter does not fit. Any other error that PEFT raises means the same.
    """
    with _all_or_nothing(model, name):
        if isinstance(model, PeftModel):
            adapted, renamed = model, None
        else:
            config = PeftConfig.from_pretrained(str(path))
            config.inference_mode = True
            renamed = getattr(model, "_checkpoint_conversion_mapping", {})
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
            adapted = kind(model, config, adapter_name=name)
        loaded = adapted.load_adapter(str(path), name, torch_device=device, key_mapping=renamed)
        for fault, keys in (("lacks", loaded.missing_keys), ("has no place for", loaded.unexpected_keys)):
            if keys:
                subject = "the file" if fault == "lacks" else "the base"
                raise ValueError(f"{subject} {fault} {len(keys)} tensors, the first of them {sorted(keys)[0]}")
    return adapted


@contextmanager
def _all_or_nothing(model: Any, name: str) -> Iterator[None]:
    """Undo what a failed load has done to the model. PEFT would leave it there."""
    try:
        yield
    except BaseException:
        if isinstance(model, PeftModel):
            model.peft_config.setdefault(name, LoraConfig())  # PEFT crosses it out, and leaves the layers as they are
            model.delete_adapter(name)
        else:
            _strip(model)
        raise


def _strip(model: nn.Module) -> None:
    """Put a base's own layers back."""
    for key, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            parent, _, leaf = key.rpartition(".")
            if leaf == "base_layer":
                continue  # PEFT nests the layers around several parameters of one module; the outermost gives way
            own = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            setattr(model.get_submodule(parent), leaf, own)
    model.__dict__.pop("peft_config", None)
    model.requires_grad_(False)
