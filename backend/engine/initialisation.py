"""Gives A, B and the frozen weight under them their first values, for the methods that decompose the weight.

`engine.decompositions` has a row for each of them. On a base in 4 bits W is read from the model's files, a layer at a
time, and decomposed in fp32. F is rounded as the base's own weights were (QPiSSA: arXiv 2404.02948, section 4).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import nn

from domain.peft.config import PeftConfig
from engine import methods
from engine.base import Base
from engine.continuing import take_weights
from engine.decompositions import DECOMPOSITIONS, Decomposition, Factors
from engine.errors import BadSetting
from engine.frozen_weights import PublishedWeights, adapted_layer, freeze, hosts
from engine.shared_weights import repeats, share_adapter

Tensors = dict[str, torch.Tensor]


def create_adapter(
    base: Base,
    name: str,
    config: PeftConfig,
    base_model_id: str,
    revision: str | None,
    again: Tensors | None = None,
    *,
    continues: Path | None = None,
    before_layer: Callable[[float], None] = lambda _done: None,
) -> Tensors:
    """Put a new adapter on the base, in the state that the method trains from.

    The caller keeps the weights that are replaced (`frozen_weights.original_weights_kept`).

    Args:
        base: With its own weights.
        name: The adapter's name.
        config: The complete configuration.
        base_model_id: For the adapter's config.
        revision: For the adapter's config.
        again: The result of an earlier call for the same run. A and B are taken from it, since a second decomposition
            of the same weights may give other bits, and takes minutes on a large model.
        continues: The folder of the adapter whose weights it begins with, if it begins with any.
        before_layer: Called with the fraction that is done before each decomposition. It may raise to end the run.

    Returns:
        A and B as initialised, if the adapter is trained on other weights than the base's; else nothing.

    Raises:
        BadSetting: The method cannot start on this model, or not with these weights.
    """
    settings = methods.lora_config(config, base.model, base_model_id, revision)
    base.create(name, settings)
    share_adapter(base.model, name)
    if config.use_dora:
        _require_norms(base, name)
    if settings.target_parameters:
        methods.put_dropout(base.model, name, config.dropout)
    if continues is not None:
        take_weights(base, name, continues)
    decomposition = DECOMPOSITIONS.get(config.init_weights)
    if decomposition is None:
        return {}
    again_held = repeats(base.model)  # a weight that several layers hold is decomposed once
    paths = [path for path in methods.targeted_layers(base.model, config) if path not in again_held]
    published = PublishedWeights(base.path, base.model.get_base_model())
    taken: Tensors = {}
    with torch.no_grad():
        for number, path in enumerate(paths):
            before_layer(number / len(paths))
            layer, key = adapted_layer(base.model, path), f"base_model.model.{path}"
            weight = _weight(layer, path, published, config)
            if again is not None:
                parts = _TAKEN if decomposition.of_rounding else (".lora_A.weight", ".lora_B.weight")
                _subtract(layer, name, weight, *(again[key + part].to(weight.device) for part in parts))
                continue
            _check_rank(path, weight, config)
            (a, b), before = _start(layer, name, weight, config, decomposition)
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.contiguous(), b.contiguous()
            if decomposition.of_rounding and before is not None:
                taken |= {key + part: factor.cpu() for part, factor in zip(_TAKEN, before, strict=True)}
    if again is not None:
        return again
    return methods.adapter_state(base.model, name) | taken if methods.changed_layers(base.model, config) else {}


def _require_norms(base: Base, name: str) -> None:
    """Refuse DoRA on a weight that has rows of zeros: it divides by each row's norm.

    Raises:
        BadSetting: It names the first such layer.
    """
    for path, _, layers in hosts(base.model.get_base_model()):
        for layer in layers:
            empty = int((layer.lora_magnitude_vector[name].weight == 0).sum()) if name in layer.lora_A else 0
            if empty:
                raise BadSetting(
                    f"DoRA divides by the norm of each row of a weight, and {path} has {empty} rows of zeros",
                    ["algorithm lora", "target_modules without it"],
                )


# LoftQ keeps these factors beside its A and B: it subtracts their product from W before the last rounding, and then
# computes A and B once more. The other methods subtract the product of A and B themselves.
_TAKEN = (".taken_A.weight", ".taken_B.weight")


def _start(
    layer: LoraLayer, name: str, weight: torch.Tensor, config: PeftConfig, decomposition: Decomposition
) -> tuple[Factors, Factors | None]:
    """Freeze the method's weight; return the first A and B, and the factors whose product was subtracted from W."""
    if not decomposition.of_rounding:
        factors = decomposition.factors(weight, config.rank, layer.scaling[name])
        _subtract(layer, name, weight, *factors)
        return factors, factors
    # The first rounding is the base's own.
    taken: Factors | None = None
    for _ in range(config.loftq_iterations or 1):
        if taken is not None:
            _subtract(layer, name, weight, *taken)
        lost = weight - dequantize_module_weight(layer.get_base_layer()).to(torch.float32)
        factors, before = decomposition.factors(lost, config.rank, layer.scaling[name]), taken
        taken = factors
    return factors, before


def _check_rank(path: str, weight: torch.Tensor, config: PeftConfig) -> None:
    """Refuse a rank that is larger than a weight allows.

    Raises:
        BadSetting: It names the largest rank.
    """
    most = min(weight.shape)
    if config.rank > most:
        raise BadSetting(
            f"rank: {path} is {weight.shape[0]} × {weight.shape[1]}; it has no {config.rank} directions to start "
            f"{config.init_weights} from",
            [f"rank {most} or lower", "target_modules without it"],
        )


def _weight(layer: LoraLayer, path: str, published: PublishedWeights, config: PeftConfig) -> torch.Tensor:
    """Return W in fp32 as (out, in)."""
    own: nn.Module = layer.get_base_layer()
    if config.quantization != "none":
        return published.read(path, own)
    return transpose(own.weight.detach().to(torch.float32), getattr(layer, "fan_in_fan_out", False))


def _subtract(layer: LoraLayer, name: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Freeze W − s·B·A in place of a layer's weight, in PEFT's order of operations, so that the bits are PEFT's."""
    residual = weight - layer.scaling[name] * b @ a
    freeze(layer.get_base_layer(), transpose(residual, getattr(layer, "fan_in_fan_out", False)))
