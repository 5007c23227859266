"""Faster ways through a pass of one token a row. They compute the same, and round in another order.

Legend: R rows, H heads of queries, K heads of keys, T columns, D the size of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sdpa"
# Measured on one core of an x86 CPU with AVX-512, beside `linear`, which is MKL's. Where the weight's rows are short,
# the product of the weight with the rows takes 0.6 of the time with one row (doubled, since MKL has a slower way for
# one) and 0.45 with two, and 0.7 with four if the weight has many rows. oneDNN takes 0.5-0.9 with one to 16 rows, and
# 50 microseconds more a call, which only a large weight is worth.
_SHORT, _WIDE, _LARGE = 1024, 2, 2**22
_FEW, _FEWEST = 4, 2


class OneTokenPasses:
    """Replaces parts of a model for the time of a pass.

    Args:
        bare: The model without PEFT's wrapper.
    """

    def __init__(self, bare: nn.Module, device: torch.device) -> None:
        self._linear: list[nn.Linear] = []
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            self._linear = [
                module
                for module in bare.modules()
                if type(module) is nn.Linear and module.weight.dtype is torch.float32 and module.weight.is_contiguous()
            ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compute passes of one token a row within this block."""
        replaced = [module for module in self._linear if "forward" not in module.__dict__]
        for module in replaced:
            module.__dict__["forward"] = partial(_thin_product, module)
        own = ALL_ATTENTION_FUNCTIONS[_NAME]
        ALL_ATTENTION_FUNCTIONS[_NAME] = partial(_attention, own)
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS[_NAME] = own
            for module in replaced:
                del module.__dict__["forward"]


def _thin_product(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return a linear layer's output for few rows."""
    weight, rows = layer.weight, x.reshape(-1, x.shape[-1])
    count, (wide, short) = rows.shape[0], weight.shape
    if short <= _SHORT and count <= (_FEW if wide > _WIDE * short else _FEWEST):
        found = torch.mm(weight, (torch.cat((rows, rows)) if count == 1 else rows).t()).t()[:count].contiguous()
        found = found if layer.bias is None else found + layer.bias
    elif weight.numel() < _LARGE:
        return linear(x, weight, layer.bias)
    else:
        found = torch.ops.mkldnn._linear_pointwise(rows, weight, layer.bias, "none", [], "")
    return found.view(*x.shape[:-1], wide)


def _attention(
    own: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Attend with the queries that share a head of keys as the tokens of one: so no key is copied for each of them.

    Args:
        own: transformers' function, which takes everything else.
        query: R × H × 1 × D.
        key: R × K × T × D.
        value: As `key`.
        attention_mask: R × 1 × 1 × T, or None.
    """
    rows, heads, length, size = query.shape
    shared = key.shape[1]
    one_for_all = attention_mask is None or attention_mask.shape[1] == 1
    if length != 1 or heads == shared or heads % shared or not one_for_all or position_bias is not None:
        arguments = {"dropout": dropout, "scaling": scaling, "position_bias": position_bias, **kwargs}
        return own(module, query, key, value, attention_mask, **arguments)
    grouped = query.reshape(rows, shared, heads // shared, size)
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, heads, 1, value.shape[-1]).transpose(1, 2).contiguous(), None
