"""The loss by chunks against the plain one: cross-entropy of the model's own logits, all at once."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.batches import Batch, pack, pad
from engine.logits import NotSplit, tail_of
from engine.loss import SummedLoss, TokenLosses, _of_chunk
from engine.model_class import attention_of, model_class
from engine.neftune import add_noise
from engine.rows import IGNORED, Row
from tests.support.small_families import OWN, SMALL, WITHOUT_HEAD_DIM

CPU = torch.device("cpu")
CHUNK = 3
# Heads that are tied and not, with a bias, capped, scaled, behind a scale; trunks that are called by other names.
FAMILIES = (
    *("llama", "gpt2", "phi", "gemma2", "gemma3_text", "cohere", "cohere2", "granite", "minicpm3", "opt", "bloom"),
    *("mixtral", "gpt_oss", "mamba", "qwen3_5_text", "stablelm", "nemotron", "glm4", "falcon", "recurrent_gemma"),
    *("granitemoe", "gemma3", "llava", "qwen2_vl"),
)
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
_VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": _TOWER | {"patch_size": 14}, "text_config": SMALL | {"vocab_size": 128}},
    "llava": {
        "vision_config": _TOWER | {"patch_size": 14, "model_type": "clip_vision_model"},
        "text_config": SMALL | {"model_type": "llama"},
        "image_token_index": 127,
    },
    "qwen2_vl": {
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 96},
        "text_config": SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    },
}
OWN_TARGETS: dict[str, Any] = {"mamba": ["in_proj", "x_proj"], "mixtral": ["q_proj", "o_proj"]}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def make(family: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """Return a small model of a family with an adapter whose weights are all random."""
    values = {**SMALL, **OWN.get(family, {})} if family not in _VISION else _VISION[family]
    if family in WITHOUT_HEAD_DIM:
        del values["head_dim"]
    chosen, config = model_class(CONFIG_MAPPING[family](**values))
    torch.manual_seed(0)
    bare = chosen._from_config(config, attn_implementation=attention_of(chosen), dtype=dtype)
    with torch.no_grad():
        for parameter in bare.parameters():  # some heads have a bias, which begins at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    bare.eval().requires_grad_(False)
    return with_adapter(bare, **({"target_modules": OWN_TARGETS.get(family, "all-linear")} | lora))


def with_adapter(bare: Any, **lora: Any) -> Any:
    model = PeftModelForCausalLM(bare, LoraConfig(task_type="CAUSAL_LM", r=4, **lora)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def row(number: int, length: int, masked: int) -> Row:
    ids = [(7 * at + 13 * number) % 120 + 3 for at in range(length)]
    return Row(number, ids, [IGNORED] * masked + ids[masked:], truncated=False)


def padded() -> Batch:
    return pad([row(0, 11, 4), row(1, 7, 2), row(2, 9, 8)], 0)


def packed() -> Batch:
    return pack([[row(0, 6, 2), row(1, 5, 0)], [row(2, 4, 1), row(3, 3, 1)]], 0)


def plain_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Return the losses of the trained tokens, from all logits."""
    inputs = {
        "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids,
    }  # fmt: skip
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    wanted = batch.labels[:, 1:]
    kept = wanted != IGNORED
    return functional.cross_entropy(logits[kept], wanted[kept], reduction="none")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(
    model: Any,
    batch: Batch,
    *,
    tokens: int = CHUNK,
    rounding: float = 2e-5,
    of: Callable[[torch.Tensor], torch.Tensor] = torch.sum,
    seed: int | None = None,
) -> TokenLosses:
    """Compare losses and gradients. Rounding is a part of the largest number of each tensor."""
    chunked = TokenLosses(model, CPU, tokens)
    results = []
    for compute in (chunked, lambda batch: plain_losses(model, batch)):
        if seed is not None:
            torch.manual_seed(seed)
        losses = compute(batch)
        results.append((losses.detach(), gradients(model, of(losses))))
    (losses, mine), (wanted, its) = results
    assert losses.dtype == torch.float32 and losses.shape == (batch.trained_tokens,)
    assert torch.allclose(losses, wanted, rtol=rounding, atol=rounding * float(wanted.abs().max()))
    assert mine.keys() == its.keys() and mine
    for name, gradient in its.items():
        apart = float((mine[name] - gradient).abs().max())
        assert apart <= rounding * max(float(gradient.abs().max()), 1e-3), name
    return chunked


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_is_taken_apart_and_losses_and_gradients_are_the_plain_ones(family: str) -> None:
    chunked = assert_equal(make(family), padded())
    assert chunked.how == "by chunks of 3 trained tokens at most"


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("tokens", [1, 4, 1000])
def test_any_chunk_gives_the_same(family: str, tokens: int) -> None:
    assert_equal(make(family), padded(), tokens=tokens)
    assert_equal(make(family), packed(), tokens=tokens)


def _seen_by_head(model: Any, run: Callable[[], Any]) -> list[int]:
    seen: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[:-1].numel()))
    run()
    handle.remove()
    return seen


def test_the_head_runs_once_over_trained_tokens_alone() -> None:
    model, batch = make("gemma2"), padded()
    loss = TokenLosses(model, CPU, CHUNK)
    seen = _seen_by_head(model, lambda: loss(batch).sum().backward())
    assert sum(seen) == batch.trained_tokens < batch.tokens
    assert max(seen) <= CHUNK


class _OfSize(TorchDispatchMode):  # type: ignore[misc]  # torch is not typed here
    """Counts the storages of a size that operators made and that were there at once at most."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._size_bytes, self._there = size_bytes, weakref.WeakSet[Any]()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() == self._size_bytes:
                self._there.add(tensor.untyped_storage())
        self.most = max(self.most, len(self._there))
        return made


@pytest.mark.parametrize(("family", "tensors"), [("llama", 2), ("gpt_oss", 2), ("mamba", 2), ("qwen3_5_text", 2)])
def test_a_chunk_holds_two_tensors_of_the_logits_size_and_no_more(family: str, tensors: int) -> None:
    model, batch = make(family), padded()
    tail = tail_of(model)
    with torch.no_grad():
        tail.hidden(lambda: model(input_ids=batch.input_ids, use_cache=False))
    # 61 tokens: no other tensor has this size.
    hidden, wanted = torch.randn(61, SMALL["hidden_size"]), torch.arange(61)
    with _OfSize(hidden.element_size() * 61 * SMALL["vocab_size"]) as seen:
        _of_chunk(tail, hidden, wanted, torch.empty_like(hidden))
    assert seen.most == tensors


def test_the_whole_step_goes_by_chunks_of_the_vocabularys_own_size() -> None:
    model = make("llama")
    loss = SummedLoss(model, CPU)
    assert loss.how == "by chunks of 98304 trained tokens at most"  # 128 entries
    assert float(loss(padded()).total.detach()) == pytest.approx(
        float(plain_losses(model, padded()).sum().detach()), rel=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "mamba"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_hits_are_the_tokens_that_no_other_is_likelier_than(family: str, trained: bool) -> None:
    """On the labels of a batch, and on labels that are the likeliest tokens of every second place."""
    model, batch = make(family), padded()
    with torch.no_grad():
        likeliest = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits.argmax(dim=-1)
    labels = batch.labels.clone()
    every_second = torch.arange(labels.shape[1] - 1) % 2 == 0
    learned = (labels[:, 1:] != IGNORED) & every_second
    labels[:, 1:][learned] = likeliest[:, :-1][learned]
    batch = replace(batch, labels=labels)
    wanted = labels[:, 1:][labels[:, 1:] != IGNORED]
    expected = likeliest[:, :-1][labels[:, 1:] != IGNORED] == wanted
    with torch.set_grad_enabled(trained):
        _, hits = TokenLosses(model, CPU, CHUNK).with_hits(batch)
        summed = SummedLoss(model, CPU)(batch)
    assert hits.tolist() == expected.tolist() and int(learned.sum()) <= int(expected.sum()) == summed.hits


def test_an_evaluation_has_the_same_losses_and_no_gradient() -> None:
    model = make("cohere")
    losses = TokenLosses(model, CPU, CHUNK)
    with torch.no_grad():
        measured = losses(padded())
        assert torch.allclose(measured, plain_losses(model, padded()), rtol=1e-5, atol=1e-6)
    assert not measured.requires_grad


# A head that is trained: by its bias, by an adapter, or whole.
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("phi", {"bias": "all"}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("gemma2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_what_is_trained_behind_the_trunk_gets_its_gradient(family: str, lora: dict[str, Any]) -> None:
    model = make(family, **lora)
    head = model.get_base_model().get_output_embeddings()
    assert any(parameter.requires_grad for parameter in head.parameters())
    assert tail_of(model).trains
    assert_equal(model, padded())


def test_dropout_in_a_heads_adapter_drops_the_same_when_its_chunk_is_computed_again() -> None:
    model = make("llama", target_modules=["lm_head"], lora_dropout=0.5).train()
    # A row whose every token is trained: its chunk has the shape of the plain pass, and draws the same mask.
    batch = pad([row(0, 9, 0)], 0)
    cut = replace(batch, attention_mask=None, trained_tokens=8)
    chunked = TokenLosses(model, CPU, 100)
    torch.manual_seed(5)
    mine = gradients(model, chunked(cut).sum())
    torch.manual_seed(5)
    hidden = model.get_base_model().model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.get_base_model().lm_head(hidden)[0]
    its = gradients(model, functional.cross_entropy(logits, batch.labels[0, 1:], reduction="sum"))
    assert mine.keys() == its.keys()
    for name in its:
        assert torch.allclose(mine[name], its[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_16_bits_round_as_they_do(family: str, dtype: torch.dtype, rounding: float) -> None:
    assert_equal(make(family, dtype), padded(), rounding=rounding)


def test_small_gradients_survive_fp16_under_a_scaler() -> None:
    model = make("llama", torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert_equal(model, padded(), rounding=0.01, of=lambda losses: scaler.scale(losses.sum() / 1e5))


def test_checkpointing_and_noise_are_those_of_the_plain_loss() -> None:
    model = make("llama", lora_dropout=0.1)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    handle = add_noise(model.get_input_embeddings(), 5.0)
    model.train()
    assert_equal(model, padded(), seed=7)
    handle.remove()


def test_a_head_in_4_bits_is_called_and_not_read() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make("llama", target_modules=["q_proj", "v_proj"])
    bare = model.get_base_model()
    four = bitsandbytes.nn.Linear4bit(96, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    four.weight = bitsandbytes.nn.Params4bit(bare.lm_head.weight.data.clone(), requires_grad=False, quant_type="nf4")
    bare.lm_head = four.to("cpu")
    four.support_avx512bf16_for_cpu = False
    assert four.weight.quant_state is not None
    assert_equal(model, padded())


def test_a_log_probability_of_each_row_and_its_gradient_follow_from_the_losses() -> None:
    """What losses over preferences compare: each row has a factor of its own, which is known at the end alone."""
    model, batch = make("gemma2"), padded()
    rows = torch.nonzero(batch.labels[:, 1:] != IGNORED)[:, 0]

    def preference(losses: torch.Tensor) -> torch.Tensor:
        better, worse, other = torch.zeros(3).index_add(0, rows, -losses)
        return -functional.logsigmoid(0.3 * (better - worse)) - functional.logsigmoid(0.1 * other)

    assert_equal(model, batch, of=preference)


class _Smeared(nn.Module):  # type: ignore[misc]
    """A head that mixes the tokens of a row."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden + hidden.cumsum(dim=1))
        return logits


def test_a_class_that_mixes_tokens_behind_its_trunk_keeps_the_plain_loss_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make("llama")
    model.get_base_model().lm_head = _Smeared(model.get_base_model().lm_head)
    with pytest.raises(NotSplit, match="change by"):
        tail_of(model)
    # The plain loss runs the head on the columns that are kept; all of them are.
    batch = pad([row(0, 9, 0), row(1, 9, 3)], 0)
    chunked = TokenLosses(model, CPU, CHUNK)
    assert chunked.how.startswith("over all logits at once: LlamaForCausalLM")
    assert "change by" in capsys.readouterr().err
    assert torch.allclose(chunked(batch), plain_losses(model, batch), rtol=1e-4)
    gradients(model, chunked(batch).sum())


def test_a_class_whose_layers_are_called_past_its_decoder_keeps_the_plain_loss() -> None:
    values = {"hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = CONFIG_MAPPING["prophetnet"](vocab_size=128, is_decoder=True, add_cross_attention=False, **values)
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = with_adapter(bare, target_modules=["query_proj"])
    losses = TokenLosses(model, CPU, CHUNK)
    assert losses.how.startswith("over all logits at once: ProphetNetForCausalLM")


def test_the_proof_changes_neither_modes_nor_random_generators() -> None:
    model = make("llama", lora_dropout=0.1).train()
    model.get_base_model().model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = torch.get_rng_state()
    tail_of(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert "forward" not in model.get_base_model().model.__dict__


def test_a_failed_pass_leaves_no_hook_and_no_stand_in() -> None:
    model = make("llama")
    loss = TokenLosses(model, CPU, CHUNK)
    broken = model.get_base_model().lm_head
    model.get_base_model().lm_head = nn.Linear(7, 7)
    with pytest.raises(RuntimeError):
        loss(padded())
    model.get_base_model().lm_head = broken
    trunk = model.get_base_model().model
    assert not trunk._forward_hooks and "forward" not in trunk.__dict__
    assert_equal(model, padded())
