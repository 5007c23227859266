"""The tokens and texts that end a turn. Training, generation and every export use the same ones.

A base may end a text with one token while its chat template ends a turn with another. Bases that are published to be
fine-tuned do so. Training teaches the template's mark, so the mark also ends what is generated.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.errors import BadData
from engine.rendering import ChatRenderer

# The text of a test answer, behind which the template's end is read. No template repeats it.
_ANSWER = "forty-two"
_CONVERSATIONS = (
    [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}],
    [
        {"role": "system", "content": "instruction"},
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _ANSWER},
    ],
)


@dataclass(frozen=True)
class TurnEnds:
    """The tokens and texts that end an answer.

    Attributes:
        mark: The token with which the chat template ends a turn; None if it ends a turn with a text.
        ids: Every token that ends a turn, the mark first.
        texts: Ends of turns that are no single token.
    """

    mark: int | None
    ids: tuple[int, ...]
    texts: tuple[str, ...]


def turn_ends(tokenizer: Any, renderer: ChatRenderer, said: int | Iterable[int] | None) -> TurnEnds:
    """Find the tokens and texts that end a turn.

    Args:
        tokenizer: The one that the model is used with.
        renderer: Renders its chat template.
        said: The end tokens that the model's generation config names.
    """
    mark, text = _template_end(tokenizer, renderer)
    named = [said] if isinstance(said, int) else list(said or ())
    ids = [token for token in (mark, *named, tokenizer.eos_token_id) if token is not None]
    return TurnEnds(mark, tuple(dict.fromkeys(ids)), (text,) if text else ())


def _template_end(tokenizer: Any, renderer: ChatRenderer) -> tuple[int | None, str]:
    """Return the token with which a template ends an answer, or the text if it is no single token."""
    for messages in _CONVERSATIONS:
        last = len(messages) - 1
        try:
            rendered = renderer.render(0, {"messages": messages}, [last])
        except BadData:
            continue  # it wants another conversation
        span = rendered.spans[last]
        at = rendered.text.rfind(_ANSWER, span.start, span.end) if span is not None else -1
        if span is None or at < 0:
            continue
        begins = at + len(_ANSWER)
        encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        marks = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if begins <= start and end <= span.end and token in marks:
                return token, ""
        text = rendered.text[begins : span.end]
        return None, text if text.strip() else ""
    return None, ""
