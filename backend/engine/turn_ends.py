"""What ends a turn: one answer for training, generation and every export.

A base may end a text with one token and its chat template a turn with another, as bases do that are published to be
fine-tuned. Training teaches the template's mark; so it ends what is generated, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.errors import BadData
from engine.rendering import ChatRenderer

# What an assistant is made to say so that its end can be seen; no template repeats it.
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
    """What ends an answer.

    Attributes:
        mark: The token that the chat template ends a turn with, if it does so with a token.
        ids: Every token that does, the mark first.
        texts: Ends of turns that are no single token.
    """

    mark: int | None
    ids: tuple[int, ...]
    texts: tuple[str, ...]


def turn_ends(tokenizer: Any, renderer: ChatRenderer, said: int | Iterable[int] | None) -> TurnEnds:
    """Find what ends a turn.

    Args:
        tokenizer: The one that the model is used with.
        renderer: Of its chat template.
        said: What the model's generation config names.
    """
    mark, text = _template_end(tokenizer, renderer)
    named = [said] if isinstance(said, int) else list(said or ())
    ids = [token for token in (mark, *named, tokenizer.eos_token_id) if token is not None]
    return TurnEnds(mark, tuple(dict.fromkeys(ids)), (text,) if text else ())


def _template_end(tokenizer: Any, renderer: ChatRenderer) -> tuple[int | None, str]:
    """Return the token that a template ends an answer with, or the text where it is no single token."""
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
