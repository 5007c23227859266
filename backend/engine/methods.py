"""Translates a configuration to PEFT's, and a trained adapter to the one that is handed out."""

import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import nn
from transformers.pytorch_utils import Conv1D

from domain.experts import obstacle
from domain.models.shape import Stacked
from domain.peft.config import PeftConfig
from domain.peft.targets import is_adapted, why_refused
from engine.decompositions import freezes_others
from engine.errors import BadSetting
from engine.frozen_weights import hosts, unwrapped
from engine.outline import places
from engine.roles import features, output_head
from engine.shared_weights import repeats


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the layers that an adapter can be asked for by name: every linear one but the output head.

    Args:
        model: With or without adapters.

    Returns:
        Module path → (in features, out features).
    """
    model = unwrapped(model)
    head = output_head(model)
    return {
        path: features(module)
        for path, module, _ in hosts(model)
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head  # bitsandbytes' quantised layers are subclasses
    }


def targeted_layers(model: nn.Module, config: PeftConfig) -> dict[str, tuple[int, int]]:
    """Select the layers that the configuration adapts: those that it names, or all that do the model's own work.

    Routers, towers for pictures and what no gradient reaches are adapted only where they are named
    (`domain.models.shape.ADAPTED`).

    Raises:
        BadSetting: A named target module is not in the model.
    """
    layers = linear_layers(model)
    names = () if config.target_modules == "all-linear" else config.target_modules
    missing = [name for name in names if not any(_means(name, path) for path in layers)]
    if missing:
        known = {path.rsplit(".", 1)[-1] for path in layers}
        raise BadSetting(f"target_modules: {why_refused(missing, known, tied=_is_tied(model))}")
    if names and config.target_experts is not True:  # what the layers do decides nothing
        return {path: shape for path, shape in layers.items() if any(_means(name, path) for name in names)}
    what = places(unwrapped(model)).roles
    return {
        path: shape
        for path, shape in layers.items()
        if is_adapted(config, what[path], named=any(_means(name, path) for name in names))
    }


def _means(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def targeted_experts(model: nn.Module, config: PeftConfig) -> dict[str, Stacked]:
    """Select the stacked experts that the configuration adapts, by the tensors' paths.

    Raises:
        BadSetting: They cannot be adapted as configured.
    """
    if config.target_experts is not True:
        return {}
    found = dict(places(unwrapped(model)).experts)
    why = obstacle(None, config) if found else None
    if why is not None:
        raise BadSetting(f"target_experts: experts cannot be adapted: {why}", ["target_experts=false"])
    return found


def _is_tied(model: nn.Module) -> bool:
    bare = unwrapped(model)
    head, embedding = output_head(bare), bare.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", head)


def target_names(model: nn.Module, config: PeftConfig) -> list[str]:
    """Return the shortest ends of paths that name the targeted layers and no other module.

    PEFT's own `all-linear` would take routers and towers as well, and put adapters on stacked experts.
    """
    if config.target_modules != "all-linear" and config.target_experts is not True:
        return list(config.target_modules)
    targets = list(targeted_layers(model, config))
    others = [path for path, _ in unwrapped(model).named_modules() if path and path not in set(targets)]
    return sorted(_find_minimal_target_modules(targets, others))


def parameter_names(model: nn.Module, config: PeftConfig) -> list[str]:
    """Return what PEFT calls the stacked experts that are targeted: the ends of their paths, from the layer on.

    Adapters on one base must name the same ones in the same words, so the words follow from the model alone.
    """
    targets = targeted_experts(model, config)
    ends = {path: _within_layer(path) for path in targets}
    stacked = [path for path, _ in unwrapped(model).named_parameters() if path not in targets]
    ambiguous = {end for end in ends.values() if any(_means(end, path) for path in stacked)}
    return sorted({path if end in ambiguous else end for path, end in ends.items()})


def _within_layer(path: str) -> str:
    """Return what follows the number of a layer in a path."""
    parts = path.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else path


def trainable_parameters(model: nn.Module, config: PeftConfig) -> int:
    """Count what an adapter of this configuration trains.

    It is r·(in + out) for each layer and each expert, and out magnitudes a layer for DoRA. Layers that hold one weight
    share an adapter.
    """
    layers, experts = targeted_layers(model, config), targeted_experts(model, config)
    held = repeats(model)
    layers = {held.get(path, path): shape for path, shape in layers.items()}
    in_layers = sum(
        config.rank * (fan_in + fan_out) + (fan_out if config.use_dora else 0) for fan_in, fan_out in layers.values()
    )
    return in_layers + sum(config.rank * item.experts * (item.fan_in + item.fan_out) for item in experts.values())


def lora_config(config: PeftConfig, model: nn.Module, base_model_id: str, revision: str | None) -> LoraConfig:
    """Write the configuration in PEFT's terms. No setting that a client may choose is left to PEFT's default.

    PEFT refuses dropout wherever experts are adapted; `put_dropout` puts it on the linear layers.
    """
    experts = parameter_names(model, config)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0 if experts else config.dropout,
        target_modules=target_names(model, config),
        target_parameters=experts or None,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        # What starts from a decomposition starts as plain LoRA in PEFT, and `engine.initialisation` goes on.
        init_lora_weights="gaussian" if config.init_weights == "gaussian" else True,
        base_model_name_or_path=base_model_id,
        revision=revision,
    )


def put_dropout(model: nn.Module, adapter: str, dropout: float) -> None:
    """Put dropout on an adapter's linear layers. Those around stacked experts have none, as PEFT wants it."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and adapter in module.lora_dropout:
            module.lora_dropout[adapter] = nn.Dropout(p=dropout) if dropout > 0 else nn.Identity()


def changed_layers(model: nn.Module, config: PeftConfig) -> list[str]:
    """Name the layers in which a run of this configuration freezes other weights than the base's."""
    return (
        sorted({repeats(model).get(path, path) for path in targeted_layers(model, config)})
        if freezes_others(config)
        else []
    )


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
