"""Tokenizes plain texts, with the tokens that a tokenizer puts around a text. Nothing else does this."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextTokens:
    """A text's T tokens, and the (start, end) characters of each. A token that was put around it has none."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class TextTokenizer:
    """Tokenizes texts with the tokens that a tokenizer puts around them. A mark that a text has is not repeated."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = _added(tokenizer)

    def __call__(self, text: str) -> TextTokens:
        """Tokenize a text."""
        bare = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(bare["input_ids"])
        before = _without(self._before, self._tokenizer.bos_token_id, ids[:1])
        after = _without(self._after, self._tokenizer.eos_token_id, ids[-1:])
        begin, end = (0, 0), (len(text), len(text))
        places = [begin] * len(before) + [(low, high) for low, high in bare["offset_mapping"]] + [end] * len(after)
        return TextTokens([*before, *ids, *after], places)


def _without(added: list[int], mark: int | None, tokens: list[int]) -> list[int]:
    return [token for token in added if token != mark] if tokens == [mark] else added


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and behind those of every text."""
    own, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    at = next((at for at in range(len(whole)) if own and whole[at : at + len(own)] == own), len(whole))
    return list(whole[:at]), list(whole[at + len(own) :])
