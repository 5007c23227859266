"""How A, B and the frozen weight under them start, for the methods that start from a decomposition of the weight.

Each of them freezes F = W − s·B'A' in place of W and starts at F + s·B₀A₀:

    PiSSA    B'A' = B₀A₀, the r largest singular values of W (arXiv 2404.02948, section 3)
    OLoRA    B'A' = B₀A₀, the first r columns of Q and rows of R in W = QR (arXiv 2406.01775, algorithm 1)

On a base in 4 bits W is read from the model's files, a layer at a time, decomposed in fp32, and F is rounded as the
base's own weights were (QPiSSA: arXiv 2404.02948, section 4).
"""

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from torch import nn

from domain.peft_config import PeftConfig
from engine import methods
from engine.base import Base
from engine.errors import BadSetting
from engine.frozen_weights import PublishedWeights, adapted_layer, freeze

Tensors = dict[str, torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]  # A as (r, in) and B as (out, r)


def create_adapter(
    base: Base, name: str, config: PeftConfig, base_model_id: str, revision: str | None, again: Tensors | None = None
) -> Tensors:
    """Put a new adapter on the base, in the state that the method trains from.

    Weights that others take the place of are for the caller to keep (`frozen_weights.original_weights_kept`).

    Args:
        base: Its weights are its own.
        name: The adapter's.
        config: The complete configuration.
        base_model_id: For the adapter's config.
        revision: For the adapter's config.
        again: What an earlier call returned for the same run. A and B are taken from there: a second decomposition of
            the same weights need not give the same bits, and takes minutes on a large model.

    Returns:
        A and B as initialised where the adapter is trained on other weights than the base's; else nothing.

    Raises:
        BadSetting: The method cannot start on this model.
    """
    base.create(name, methods.lora_config(config, base_model_id, revision))
    if config.init_weights not in _DECOMPOSITIONS:
        return {}
    published = PublishedWeights(base.path, base.model.get_base_model().base_model_prefix)
    with torch.no_grad():
        for path in methods.changed_layers(base.model, config):
            layer = adapted_layer(base.model, path)
            weight = _weight(layer, path, published, config)
            if config.rank > min(weight.shape):
                raise BadSetting(
                    f"rank: {path} is {' × '.join(map(str, weight.shape))}; it has no {config.rank} directions to "
                    f"start {config.init_weights} from",
                    [f"rank {min(weight.shape)} or lower", "target_modules without it"],
                )
            if again is None:
                a, b = _DECOMPOSITIONS[config.init_weights](weight, config.rank, layer.scaling[name])
                layer.lora_A[name].weight.data = a.contiguous()
                layer.lora_B[name].weight.data = b.contiguous()
            else:
                key = f"base_model.model.{path}"
                a, b = (again[f"{key}.{part}.weight"].to(weight.device) for part in ("lora_A", "lora_B"))
            _subtract(layer, weight, layer.scaling[name] * b, a)
    return methods.adapter_state(base.model, name) if again is None else again


def _weight(layer: LoraLayer, path: str, published: PublishedWeights, config: PeftConfig) -> torch.Tensor:
    """Return W in fp32 as (out, in)."""
    own: nn.Module = layer.get_base_layer()
    if config.quantization != "none":
        return published.read(path, own)
    return transpose(own.weight.detach().to(torch.float32), getattr(layer, "fan_in_fan_out", False))


def _subtract(layer: LoraLayer, weight: torch.Tensor, scaled_b: torch.Tensor, a: torch.Tensor) -> None:
    """Freeze W − s·B·A in place of a layer's weight, in PEFT's order of operations, so that the bits are PEFT's."""
    freeze(layer.get_base_layer(), transpose(weight - scaled_b @ a, getattr(layer, "fan_in_fan_out", False)))


def principal_factors(weight: torch.Tensor, rank: int, scaling: float) -> Factors:
    """Return A and B whose product, scaled, is the best approximation of a weight of that rank.

    Source: PiSSA (arXiv 2404.02948), equations 2 and 3; the arithmetic is PEFT's (`LoraLayer.pissa_init`).
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag(torch.sqrt(values[:rank] / scaling))
    return root @ right[:rank], left[:, :rank] @ root


def orthonormal_factors(weight: torch.Tensor, rank: int, _scaling: float) -> Factors:
    """Return A and B from a QR decomposition, B with orthonormal columns.

    Source: OLoRA (arXiv 2406.01775), algorithm 1; the arithmetic is PEFT's (`LoraLayer.olora_init`), which scales
    what is subtracted and not the factors.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


_DECOMPOSITIONS: dict[str, Callable[[torch.Tensor, int, float], Factors]] = {
    "pissa": principal_factors,
    "olora": orthonormal_factors,
}
