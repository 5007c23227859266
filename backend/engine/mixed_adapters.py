"""Rows of one batch with an adapter each: how plain LoRA layers compute with several adapters at once.

The A's of the adapters stand below one another in one matrix, and the B's beside one another in another. The product
of a row with all A's is set to zero where an adapter is not the row's, and scaled where it is. So a layer takes two
products however many adapters there are. PEFT's `adapter_names` takes two products, two copies of rows and several
searches through lists for each adapter and layer.

Numbers are those of PEFT's layer to rounding: it scales behind B, and here the scale is before it.
"""

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from engine.frozen_weights import unwrapped

# An adapter's rank, place and scale in a layer, for each adapter of the stack that the layer has.
_Layout = tuple[tuple[str, int, float], ...]


def can_mix(model: Any, name: str) -> bool:
    """Tell whether an adapter is a plain LoRA on linear layers, with finite weights: nothing else is mixed."""
    found = False
    for module in unwrapped(model).modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters:
            return False
        if isinstance(module, BaseTunerLayer) and name in _adapters_of(module):
            if not _plain(module, name):
                return False
            found = True
    return found


def _adapters_of(layer: Any) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}


def _plain(layer: Any, name: str) -> bool:
    kinds = [Linear]
    try:
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError:  # bitsandbytes is not installed
        pass
    else:
        kinds.append(Linear4bit)
    if type(layer) not in kinds or layer.merged or name in layer.lora_variant or name not in layer.lora_A:
        return False
    a, b = layer.lora_A[name], layer.lora_B[name]
    plain = type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None
    return plain and bool(torch.isfinite(a.weight).all()) and bool(torch.isfinite(b.weight).all())


class MixedAdapters:
    """Several adapters in one pass. While `using` none, the layers are PEFT's own.

    Args:
        model: With adapters on it.
    """

    def __init__(self, model: Any) -> None:
        self._layers = [module for module in unwrapped(model).modules() if isinstance(module, LoraLayer)]
        self._stacked: tuple[str, ...] = ()
        self._stacks: list[tuple[LoraLayer, _Layout, torch.Tensor, torch.Tensor]] = []
        self._masks: dict[_Layout, torch.Tensor] = {}
        self._rows: tuple[str | None, ...] = ()
        self._on = False

    def use(self, rows: Sequence[str | None], coming: Set[str] = frozenset()) -> None:
        """Compute with an adapter for each row from now on. PEFT's own adapters must be disabled.

        Args:
            rows: None is the base. One is that of all rows.
            coming: Adapters that will be used soon.
        """
        named = {name for name in rows if name is not None}
        if not named <= set(self._stacked):
            self.stop()
            self._stack(tuple(sorted(named | coming)))
        if tuple(rows) != self._rows:
            self._rows, self._masks = tuple(rows), {}
        if not self._on:
            for layer, layout, a, b in self._stacks:
                layer.__dict__["forward"] = partial(self._forward, layer.base_layer, layout, a, b)
            self._on = True

    def stop(self) -> None:
        """Compute as PEFT does from now on."""
        if self._on:
            for layer, *_ in self._stacks:
                del layer.__dict__["forward"]
            self._on = False

    def _stack(self, names: tuple[str, ...]) -> None:
        self._stacked, self._stacks, self._rows = names, [], ()
        for layer in self._layers:
            here = [name for name in names if name in layer.lora_A]
            if here:
                layout = tuple((name, layer.r[name], float(layer.scaling[name])) for name in here)
                a = torch.cat([layer.lora_A[name].weight.detach() for name in here])
                b = torch.cat([layer.lora_B[name].weight.detach() for name in here], dim=1)
                self._stacks.append((layer, layout, a, b))

    def _forward(
        self, base: Callable[[torch.Tensor], torch.Tensor], layout: _Layout, a: torch.Tensor, b: torch.Tensor,
        x: torch.Tensor, *args: Any, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Return a layer's output.

        Args:
            base: The layer without adapters.
            layout: Of the stacks.
            a: (sum of the ranks, in).
            b: (out, sum of the ranks).
            x: (rows, tokens, in).
        """
        result = base(x, *args, **kwargs)
        inner = nn.functional.linear(x.to(a.dtype), a) * self._mask(layout, a)
        mixed: torch.Tensor = (result + nn.functional.linear(inner, b)).to(result.dtype)
        return mixed

    def _mask(self, layout: _Layout, a: torch.Tensor) -> torch.Tensor:
        """Return each row's factors, (rows, 1, sum of the ranks): its adapter's scale, and zero elsewhere."""
        if layout not in self._masks:
            factors = [
                [scale if name == own else 0.0 for name, rank, scale in layout for _ in range(rank)]
                for own in self._rows
            ]
            self._masks[layout] = torch.tensor(factors, dtype=a.dtype, device=a.device)[:, None]
        return self._masks[layout]
