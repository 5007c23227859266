"""Weights that several modules hold, as where layers are repeated: one adapter belongs to all of those modules.

Zamba, for example, computes several layers with one block of attention. PEFT sees modules, and would give each an
adapter of its own; the sum of base and adapter would then be several weights, where the model has one. Here the
modules of one weight share A and B. The adapter's file has them under each module's name, so stock PEFT loads it, and
a merge adds them once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from engine.frozen_weights import hosts, unwrapped


def corrects(layer: LoraLayer) -> str:
    """Return the name of the parameter that an adapter's layer corrects."""
    return layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """Return the parameters that several modules hold, each by all of its names, in the model's order.

    Args:
        model: With or without adapters; the names are those without.
    """
    names: dict[int, list[str]] = {}
    for path, host, _ in hosts(unwrapped(model)):
        for attribute, parameter in host.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{path}.{attribute}".lstrip("."))
    return [group for group in names.values() if len(group) > 1]


def repeats(model: nn.Module) -> dict[str, str]:
    """Return the modules whose weight an earlier module holds: path → the path of the first that holds it.

    Args:
        model: With or without adapters.
    """
    found: dict[str, str] = {}
    for first, *others in shared_parameters(model):
        if first.endswith(".weight"):
            found |= {other.removesuffix(".weight"): first.removesuffix(".weight") for other in others}
    return found


def share_adapter(model: nn.Module, adapter: str) -> None:
    """Let the layers of an adapter that correct one parameter have the same tensors.

    Args:
        model: With the adapter, in which each layer has its own.
        adapter: Its name.
    """
    firsts: dict[int, Any] = {}
    for _, host, layers in hosts(unwrapped(model)):
        for layer in layers:
            if adapter not in layer.scaling:
                continue
            first = firsts.setdefault(id(getattr(host, corrects(layer))), layer)
            if first is layer:
                continue
            for part in layer.adapter_layer_names:
                own, shared = getattr(layer, part), getattr(first, part)
                if adapter in own:
                    own[adapter] = shared[adapter]


def correct_alike(layers: list[tuple[LoraLayer, ...]], adapter: str) -> bool:
    """Tell whether an adapter corrects one parameter by the same numbers in all of the modules that hold it.

    Args:
        layers: Of each of the modules, those that correct it.
        adapter: Its name.
    """
    if len({len(own) for own in layers}) != 1:
        return False
    for same in zip(*layers, strict=True):
        first, *others = same
        if any(other.scaling[adapter] != first.scaling[adapter] for other in others):
            return False
        wanted = list(_numbers(first, adapter))
        for other in others:
            found = list(_numbers(other, adapter))
            if len(found) != len(wanted) or not all(map(torch.equal, found, wanted)):
                return False
    return True


def _numbers(layer: Any, adapter: str) -> Iterator[torch.Tensor]:
    for part in layer.adapter_layer_names:
        places = getattr(layer, part)
        if adapter in places:
            held = places[adapter]
            yield from held.parameters() if isinstance(held, nn.Module) else (held,)
