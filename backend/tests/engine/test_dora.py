"""Blocked norms are PEFT's norms, in every pass, and leave nothing of a weight's size behind."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from domain.peft.algorithms import Algorithm
from engine import dora
from engine.dora import BlockedDora, row_norms, use_blocks
from tests.engine.test_methods import config_for, create, disturb, load, logits

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three rows of 64 at a time, so that tiny layers have many blocks and a last one that is not full."""
    monkeypatch.setattr(dora, "_BLOCK_BYTES", {"cpu": 3 * 64 * 4})
    yield
    use_blocks()


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 8),
    scaling=st.floats(0.01, 8),
    cancelled=st.booleans(),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_norms_of_blocks_are_the_norms_of_the_whole(
    rows: int, columns: int, rank: int, scaling: float, cancelled: bool, kind: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator)
    b = torch.randn(rows, rank, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    if cancelled:  # B·A nearly takes W back
        weight = 1e-3 * weight - scaling * b @ a
    weight = weight.to(kind)
    exact = torch.linalg.vector_norm(weight.double() + scaling * b.double() @ a.double(), dim=1)
    size = torch.linalg.vector_norm(weight.double().abs() + scaling * b.double().abs() @ a.double().abs(), dim=1)
    found = row_norms(weight, a, b, scaling)
    assert found.dtype is torch.float32 and found.shape == (rows,)
    assert ((found - exact).abs() <= 2e-6 * size + 1e-30).all()


class Two(nn.Module):
    """A linear layer with a bias, one as GPT-2 stores it, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 48), Conv1D(64, 48), nn.Linear(64, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def _with_dora(kind: type, *, dropout: float, rslora: bool) -> Any:
    variants.DoraLinearLayer = kind
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["first", "second", "third"], use_dora=True, lora_dropout=dropout, use_rslora=rslora
    )
    model = get_peft_model(Two(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1).add_(0.05 * torch.randn(parameter.shape))
    assert {type(layer) for layer in model.modules() if isinstance(layer, DoraLinearLayer)} == {kind}
    return model


def test_norms_without_data_have_their_size() -> None:
    weight, a, b = (torch.empty(size, device="meta") for size in ((9, 5), (2, 5), (9, 2)))
    assert row_norms(weight, a, b, 2.0).shape == (9,)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_gradients_and_merged_weights_are_pefts(dropout: float, rslora: bool) -> None:
    x, found = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)), []
    for kind in (DoraLinearLayer, BlockedDora):
        model = _with_dora(kind, dropout=dropout, rslora=rslora)
        torch.manual_seed(4)
        out = model(x)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model.eval()
        with torch.no_grad():
            answer = model(x)
            merged = model.merge_and_unload()(x)
        assert torch.allclose(answer, merged, atol=1e-5)
        found.append({"out": out.detach(), "answer": answer, **gradients, **{f"is {n}": p for n, p in state.items()}})
    theirs, ours = found
    assert theirs.keys() == ours.keys() and len(theirs) == 2 + 2 * 9
    for name, expected in theirs.items():
        assert torch.allclose(ours[name], expected, rtol=1e-5, atol=1e-5), name
    assert (theirs["out"] - theirs["answer"]).abs().max() > 0.02 or dropout == 0


class LargestResult(TorchDispatchMode):
    """Notes the most elements that any operation's new result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given_ = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given_:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_pass_makes_a_matrix_of_a_weights_size(dropout: float) -> None:
    largest = {}
    for kind in (DoraLinearLayer, BlockedDora):
        model, x = _with_dora(kind, dropout=dropout, rslora=False), torch.randn(1, 2, 64)
        with LargestResult() as results:
            model(x).sum().backward()
        largest[kind] = results.elements
    assert largest[DoraLinearLayer] >= 48 * 64  # PEFT does, so the measurement can see it
    assert largest[BlockedDora] <= 4 * 64  # the adapter's own gradients: 4 × 64


def test_every_adapter_of_an_engine_computes_so(tiny_path: Path, tmp_path: Path) -> None:
    base, config = load(tiny_path, config_for(Algorithm.DORA)), config_for(Algorithm.DORA)
    create(base, config)
    disturb(base)
    answer = logits(base)
    base.model.save_pretrained(str(tmp_path), selected_adapters=["adp"], save_embedding_layers=False)
    base.attach("loaded", tmp_path / "adp")
    with base.using("loaded"):
        assert torch.equal(logits(base), answer)
    layers = [layer for layer in base.model.modules() if isinstance(layer, DoraLinearLayer)]
    assert len(layers) == 2 * 14 and {type(layer) for layer in layers} == {BlockedDora}


@pytest.mark.parametrize("algorithm", [Algorithm.DORA, Algorithm.QLORA])
def test_norms_are_kept_while_a_model_answers_and_only_then(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm
) -> None:
    taken = []

    def counted(*arguments: Any) -> torch.Tensor:
        taken.append(1)
        return row_norms(*arguments)

    config = config_for(algorithm, use_dora=True)
    base = load(tiny_path, config)
    create(base, config)
    monkeypatch.setattr(dora, "row_norms", counted)
    first = logits(base)
    assert len(taken) == 14 and torch.equal(logits(base), first) and len(taken) == 14
    disturb(base)  # in place, and in eval mode
    moved = logits(base)
    assert len(taken) == 28 and not torch.equal(moved, first)

    base.model.train()
    assert torch.equal(logits(base), moved) and torch.equal(logits(base), moved) and len(taken) == 56
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)  # as a kernel of its own writes: torch does not count it
    base.model.eval()
    halved = logits(base)
    assert len(taken) == 70 and not torch.equal(halved, moved)
    base.model.train()
    assert torch.equal(logits(base), halved)


def test_training_starts_at_the_norms_themselves() -> None:
    model = _with_dora(BlockedDora, dropout=0.0, rslora=False)
    fresh = Two()
    for name in ("first", "second", "third"):
        layer = model.base_model.model.get_submodule(name)
        magnitudes = BlockedDora(layer.fan_in_fan_out)
        magnitudes.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=torch.randn(4, layer.in_features),
            lora_B=torch.zeros(layer.out_features, 4),
            scaling=2.0,
        )
        weight = layer.get_base_layer().weight
        rows = weight.T if isinstance(fresh.get_submodule(name), Conv1D) else weight
        assert torch.equal(magnitudes.weight, torch.linalg.vector_norm(rows.contiguous(), dim=1))
        assert math.isclose(magnitudes.weight.detach().norm(), rows.detach().norm(), rel_tol=1e-5)


@pytest.mark.parametrize(("algorithm", "precision"), [(Algorithm.DORA, "bf16"), (Algorithm.QLORA, "fp32")])
def test_an_adapter_that_has_learned_nothing_changes_nothing_in_few_bits_either(
    tiny_path: Path, algorithm: Algorithm, precision: str
) -> None:
    config = config_for(algorithm, use_dora=True, precision=precision)
    base = load(tiny_path, config)
    before = logits(base)
    create(base, config)
    magnitudes = [layer.weight for layer in base.model.modules() if isinstance(layer, DoraLinearLayer)]
    assert len(magnitudes) == 14 and {weight.dtype for weight in magnitudes} == {torch.float32}
    assert torch.equal(logits(base), before)
