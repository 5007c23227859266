"""Translates a configuration to PEFT's, and a trained adapter to the one that is handed out."""

import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import nn
from transformers.pytorch_utils import Conv1D

from domain.models.shape import ADAPTED
from domain.peft.config import PeftConfig
from domain.peft.targets import why_refused
from engine.decompositions import freezes_others
from engine.errors import BadSetting
from engine.frozen_weights import unwrapped
from engine.outline import layer_roles
from engine.roles import features, output_head


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the layers that an adapter can be asked for by name: every linear one but the output head.

    Args:
        model: With or without adapters.

    Returns:
        Module path → (in features, out features).
    """
    model = unwrapped(model)
    head = output_head(model)
    layers = {}
    adapted = None  # the layer with adapters whose parts are being passed over
    for name, module in model.named_modules():
        if module is head or (adapted is not None and name.startswith(adapted)):
            continue
        adapted = f"{name}." if isinstance(module, LoraLayer) else None
        if isinstance(module, LoraLayer):
            module = module.get_base_layer()
        if isinstance(module, nn.Linear | Conv1D):  # bitsandbytes' quantised layers are subclasses
            layers[name] = features(module)
    return layers


def targeted_layers(model: nn.Module, config: PeftConfig) -> dict[str, tuple[int, int]]:
    """Select the layers that the configuration adapts: those that it names, or all that do the model's own work.

    Routers, towers for pictures and what no gradient reaches are adapted only where they are named
    (`domain.models.shape.ADAPTED`).

    Raises:
        BadSetting: A named target module is not in the model.
    """
    layers = linear_layers(model)
    if config.target_modules == "all-linear":
        what = layer_roles(unwrapped(model))
        return {path: shape for path, shape in layers.items() if what[path] in ADAPTED}
    missing = [
        name for name in config.target_modules if not any(path == name or path.endswith(f".{name}") for path in layers)
    ]
    if missing:
        known = {path.rsplit(".", 1)[-1] for path in layers}
        raise BadSetting(f"target_modules: {why_refused(missing, known, tied=_is_tied(model))}")
    return {
        path: shape
        for path, shape in layers.items()
        if any(path == name or path.endswith(f".{name}") for name in config.target_modules)
    }


def _is_tied(model: nn.Module) -> bool:
    bare = unwrapped(model)
    head, embedding = output_head(bare), bare.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", head)


def target_names(model: nn.Module, config: PeftConfig) -> list[str]:
    """Return the shortest ends of paths that name the targeted layers and no other module.

    PEFT's own `all-linear` would take routers and towers as well, and put adapters on stacked experts.
    """
    if config.target_modules != "all-linear":
        return list(config.target_modules)
    targets = list(targeted_layers(model, config))
    others = [path for path, _ in unwrapped(model).named_modules() if path and path not in set(targets)]
    return sorted(_find_minimal_target_modules(targets, others))


def trainable_parameters(layers: dict[str, tuple[int, int]], config: PeftConfig) -> int:
    """Count what an adapter of this configuration trains: r·(in + out) a layer, and out magnitudes for DoRA."""
    return sum(
        config.rank * (fan_in + fan_out) + (fan_out if config.use_dora else 0) for fan_in, fan_out in layers.values()
    )


def lora_config(config: PeftConfig, model: nn.Module, base_model_id: str, revision: str | None) -> LoraConfig:
    """Write the configuration in PEFT's terms. No setting that a client may choose is left to PEFT's default."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=target_names(model, config),
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        # What starts from a decomposition starts as plain LoRA in PEFT, and `engine.initialisation` goes on.
        init_lora_weights="gaussian" if config.init_weights == "gaussian" else True,
        base_model_name_or_path=base_model_id,
        revision=revision,
    )


def changed_layers(model: nn.Module, config: PeftConfig) -> list[str]:
    """Name the layers in which a run of this configuration freezes other weights than the base's."""
    return list(targeted_layers(model, config)) if freezes_others(config) else []


def adapter_state(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names that PEFT saves them by, on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def as_plain_lora(
    trained: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Rewrite an adapter that was trained on a residual so that it works on the unmodified base.

    The trained model is W − s·B₀A₀ + s·BA; with A' = [A; A₀] (2r × in) and B' = [B, −B₀] (out × 2r) the
    plain LoRA s·B'A' on W says the same. Scaling stays s: alpha doubles with the rank, and with rsLoRA,
    whose s' = 2·alpha/√(2r) = √2·s, the factor goes into B'.

    The unmodified base is W as published. On a base in 4 bits, nf4(W − s·B₀A₀) was frozen in place of W − s·B₀A₀. The
    error of that rounding is not of low rank, so no LoRA on W or on nf4(W) repeats it exactly. On W the result lacks
    the rounding of the residual, which QPiSSA makes small. On nf4(W) it also has the rounding of W. The factors are the
    same for both, and stock PEFT gives the same logits as this service on either. docs/methods.md has the measured
    sizes.

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
