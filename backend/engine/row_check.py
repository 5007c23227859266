"""Whether a model computes a row the same whatever rows are beside it: shown on the model itself.

Nothing is known here about any family. Two prompts are continued by the class' own `generate`, each alone. Then they go
through the model as answers together do: one in pieces, one joining later, one leaving. Where the logits differ, or the
class fails with the cache that is handed to it (one that keeps a state instead of keys and values does), answers of the
model are given one after the other.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from engine.base import Base
from engine.frozen_weights import unwrapped
from engine.one_token import OneTokenPasses
from engine.row_cache import RowCache

_PROMPTS = (9, 5)  # tokens
_PIECE = 4
_STEPS = 3
# How far logits may be apart, as a part of the largest: products of other sizes add up in another order.
_APART = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.005}


class NotTogether(Exception):
    """Rows of the model cannot be computed together; the text says why."""


@dataclass(frozen=True)
class RowFacts:
    """What is known of a model whose rows can be computed together.

    Attributes:
        token_bytes: Memory of the keys and values of one token.
        longest: Most tokens of a row that is computed with others; None without a bound. Beyond it attention looks back
            no further than a window, or positions are stretched for the whole batch.
    """

    token_bytes: int
    longest: int | None


class RowPasses:
    """Forward passes over prompts and over rows, as a model's own class takes them.

    Args:
        model: With adapters or without.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._bare, self._device = unwrapped(model), device
        taken = inspect.signature(self._bare.forward).parameters
        if not {"input_ids", "attention_mask", "past_key_values"} <= set(taken):
            raise NotTogether("its class takes no cache of keys and values")
        self._takes_positions = "position_ids" in taken
        self._one_token = OneTokenPasses(self._bare, device)
        self._for_prompt = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    def prompt(self, ids: list[int], cache: DynamicCache) -> torch.Tensor:
        """Compute tokens that follow what is in the cache; return the logits behind the last of them, 1 × V."""
        begin = cache.get_seq_length()
        tokens = torch.tensor([ids], device=self._device)
        places = torch.arange(begin, begin + len(ids), device=self._device)[None]
        output = self._bare(
            input_ids=tokens,
            attention_mask=torch.ones((1, begin + len(ids)), dtype=torch.long, device=self._device),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **self._placed(places),
            **self._for_prompt,
        )
        last: torch.Tensor = output.logits[:, -1]
        return last

    def step(self, rows: RowCache, tokens: list[int]) -> torch.Tensor:
        """Compute the next token of each row; return the logits behind them, R × V. The cache has room for them."""
        with self._one_token():
            output = self._bare(
                input_ids=torch.tensor(tokens, device=self._device)[:, None],
                attention_mask=rows.mask(self._device),
                past_key_values=rows.cache,
                use_cache=True,
                return_dict=True,
                **self._placed(rows.positions(self._device)),
            )
        rows.wrote()
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _placed(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"position_ids": places} if self._takes_positions else {}


def states_of(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values of each layer.

    Raises:
        NotTogether: The class keeps something else.
    """
    states = []
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        if not (isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4):
            raise NotTogether("a layer keeps no keys and values of each token")
        states.append((keys, values))
    return states


@torch.no_grad()  # type: ignore[untyped-decorator]
def row_facts(base: Base) -> RowFacts:
    """Show that answers can be computed together, and what one takes. The bare base computes.

    Raises:
        NotTogether: They cannot.
    """
    if base.engine != "transformers":
        raise NotTogether(f"{base.engine} answers by a path of its own")
    bare = unwrapped(base.model)
    for module in bare.modules():
        if type(module).__name__ == "Linear8bitLt":
            raise NotTogether("8-bit layers choose what they compute in 16 bits by all rows of a pass")
    try:
        _require_sampling(bare)
        with base.using(None):
            token_bytes = _require_the_same(bare, base.device)
        longest = _longest(bare)
    except NotTogether:
        raise
    except Exception as error:  # the class' own code, called as it does not expect
        raise NotTogether(f"its class fails with rows together: {error!r}"[:300]) from error
    return RowFacts(token_bytes, longest)


def _require_sampling(bare: Any) -> None:
    config, _ = bare._prepare_generation_config(GenerationConfig(max_new_tokens=1))
    config.do_sample = False
    if config.get_generation_mode() is not GenerationMode.GREEDY_SEARCH:
        raise NotTogether("its generation config asks for more than sampling")


def _longest(bare: Any) -> int | None:
    """Return up to how many tokens a row's numbers depend on nothing beside it."""
    bounds = []
    for layer in DynamicCache(config=bare.config).layers:
        most = layer.get_max_length()
        if most > 0:
            bounds.append(int(most) - 1)
    for module in bare.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
            text = bare.config.get_text_config(decoder=True)
            told = (getattr(text, "rope_parameters", None) or {}).get("original_max_position_embeddings")
            bounds.append(int(told or getattr(text, "original_max_position_embeddings", 0) or 0))
    return min(bounds, default=None)


def _require_the_same(bare: Any, device: torch.device) -> int:
    count = bare.get_input_embeddings().weight.shape[0]
    ids = [(3 + 7 * place) % count for place in range(sum(_PROMPTS))]
    long, short = ids[: _PROMPTS[0]], ids[_PROMPTS[0] :]
    wanted = [_alone(bare, prompt, device) for prompt in (long, short)]
    passes, rows = RowPasses(bare, device), RowCache()
    most = max(_PROMPTS) + 2 * _STEPS
    apart = 0.0

    def compare(found: torch.Tensor, row: int, step: int) -> None:
        nonlocal apart
        told = wanted[row][1][step]
        size = max(float(told.abs().max()), 1e-6)
        difference = float((found.float() - told).abs().max()) / size
        apart = max(apart, difference if difference == difference else 1.0)  # NaN is not the same

    first, second = DynamicCache(), DynamicCache()
    for begin in range(0, len(short), _PIECE):
        found = passes.prompt(short[begin : begin + _PIECE], first)
    compare(found[0], 1, 0)
    states = states_of(first)
    token_bytes = sum(int(state[0, :, 0].numel()) * state.element_size() for pair in states for state in pair)
    rows.add(states, most)
    compare(passes.step(rows, [wanted[1][0][0]])[0], 1, 1)
    compare(passes.prompt(long, second)[0], 0, 0)
    rows.add(states_of(second), most)
    for step in range(1, _STEPS - 1):
        rows.prepare(most)
        both = passes.step(rows, [wanted[1][0][step], wanted[0][0][step - 1]])
        compare(both[0], 1, step + 1)
        compare(both[1], 0, step)
    rows.remove(0)
    rows.prepare(most)
    compare(passes.step(rows, [wanted[0][0][_STEPS - 2]])[0], 0, _STEPS - 1)
    if apart > _APART.get(bare.dtype, _APART[torch.bfloat16]):
        raise NotTogether(f"a row's logits change by {apart:.1%} with the rows beside it")
    return token_bytes


def _alone(bare: Any, prompt: list[int], device: torch.device) -> tuple[list[int], list[torch.Tensor]]:
    """Return the tokens that the class' own `generate` takes after a prompt, and the logits behind each."""
    ids = torch.tensor([prompt], device=device)
    config = GenerationConfig(
        max_new_tokens=_STEPS,
        min_new_tokens=_STEPS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = bare.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output.sequences[0, len(prompt) :].tolist(), [logits[0].float() for logits in output.logits]
