"""The report on what a run consists of. It reads the modules and the optimizer, and not the request."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from domain.protocol import OptimizerGroup, TrainingBuilt
from engine.base import Base


def run_report(request_id: str, base: Base, optimizer: torch.optim.Optimizer) -> TrainingBuilt:
    """Describe the base with its active adapter and the optimizer over it, as they stand before the first step."""
    model, adapter = base.model, base.model.active_adapter
    # Other adapters on the base may have layers of their own.
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and _holds(m, adapter)}
    # An adapter's layer shows its base layer's weight as its own.
    plain = [module for module in model.modules() if not isinstance(module, BaseTunerLayer)]
    quantized = [module for module in plain if _storage(module) is not None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = _adapter_parameters(model)
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in adapters]
    return TrainingBuilt(
        request_id=request_id,
        engine=base.engine,
        device=str(base.device),
        base_types=_elements(frozen),
        quantized_modules=dict(Counter(str(_storage(module)) for module in quantized)),
        compute_types=sorted({_name(module.compute_dtype) for module in quantized if hasattr(module, "compute_dtype")}),
        checkpointed_modules=sum(bool(getattr(module, "gradient_checkpointing", False)) for module in plain),
        adapted_modules=dict(Counter(_called(name, module) for name, module in adapted.items())),
        ranks=_distinct(adapted.values(), "r", adapter),
        scalings=_distinct(adapted.values(), "scaling", adapter),
        dropouts=sorted({_dropout(module, adapter) for module in adapted.values()}),
        dora_modules=sum(adapter in getattr(module, "lora_magnitude_vector", {}) for module in adapted.values()),
        adapter_types=_elements(trained),
        optimizer=f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}",
        loss=base.backend.loss_described(),
        groups=[_group(group) for group in optimizer.param_groups],
    )


def _holds(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, {}) for name in layer.adapter_layer_names)


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Return the ids of all adapters' parameters. All other parameters are the base's."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    held = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return {id(p) for part in held if isinstance(part, nn.Module) for p in part.parameters()}


def _called(name: str, module: BaseTunerLayer) -> str:
    """Return the last part of what a layer with adapters is called; of one around a parameter, the parameter's name."""
    return str(module.parameter_name) if isinstance(module, ParamWrapper) else name.rpartition(".")[2]


def _storage(module: nn.Module) -> str | None:
    """Name how bitsandbytes stores a module's weight: `nf4`, `nf4 (double)`, `int8`; None for a plain one."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return f"{state.quant_type} (double)" if state.nested else str(state.quant_type)
    return "int8" if type(weight).__name__ == "Int8Params" else None


def _elements(parameters: Iterable[nn.Parameter]) -> dict[str, int]:
    """Count stored elements by type. A packed 4-bit weight counts as its bytes."""
    counts: Counter[str] = Counter()
    for parameter in parameters:
        counts[_name(parameter.dtype)] += parameter.numel()
    return dict(counts)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _distinct(modules: Iterable[Any], attribute: str, adapter: str) -> list[float]:
    values = (getattr(module, attribute, {}) for module in modules)
    return sorted({float(value[adapter]) for value in values if adapter in value})


def _dropout(module: Any, adapter: str) -> float:
    dropouts = getattr(module, "lora_dropout", {})
    return float(getattr(dropouts[adapter], "p", 0.0)) if adapter in dropouts else 0.0


def _group(group: dict[str, Any]) -> OptimizerGroup:
    return OptimizerGroup(
        parameters=sum(parameter.numel() for parameter in group["params"]),
        learning_rate=float(group.get("initial_lr", group["lr"])),
        weight_decay=float(group["weight_decay"]),
        betas=list(group["betas"]),
        epsilon=float(group["eps"]),
    )
