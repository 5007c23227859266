"""The faster ways through a pass of one token compute what the model's own parts do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.one_token import OneTokenPasses

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("wide", "short", "bias"), [(96, 32, True), (32, 96, False), (2048, 2048, True)])
def test_products_are_those_of_the_layer(rows: int, wide: int, short: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(short, wide, bias=bias))
    x = torch.randn(rows, 1, short)
    with torch.no_grad():
        wanted = model(x)
        with OneTokenPasses(model, torch.device("cpu"))():
            assert "forward" in model[0].__dict__
            found = model(x)
    assert "forward" not in model[0].__dict__ and found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "shared", "tokens"), [(6, 2, 1), (4, 4, 1), (6, 2, 3)])
def test_attention_is_that_of_transformers(heads: int, shared: int, tokens: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads, tokens, 8)
    key, value = torch.randn(3, shared, 7, 8), torch.randn(3, shared, 7, 8)
    mask = torch.ones(3, 1, tokens, 7, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[1, ..., :4] = False
    module: Any = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True)
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    wanted, _ = own(module, query, key, value, mask, scaling=0.3)
    with OneTokenPasses(nn.Sequential(), torch.device("cpu"))():
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    torch.testing.assert_close(found, wanted)
