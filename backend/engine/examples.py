"""What a run takes from a row: one token sequence, several of a long text, or a better and a worse answer."""

from collections.abc import Sequence
from typing import Any

from domain.peft.config import PeftConfig
from engine.batches import RowTokenizer
from engine.rendering import ChatRenderer
from engine.rows import Row


def conversations(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what of a row goes through the model: itself, or for a preference the prompt with each of its answers.

    Only the answers that are compared are learned, not those in the prompt.
    """
    if "prompt" not in row:
        return [row]
    prompt = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in row["prompt"]]
    answers = [row["chosen"], row["rejected"]] if "chosen" in row else [row["completion"]]
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return [{"messages": [*prompt, *answer], **tools} for answer in answers]


class ExampleTokenizer:
    """Turns rows into examples.

    Args:
        tokenizer: The base's.
        config: Says what is learned, and how long a row may be.
    """

    def __init__(self, tokenizer: Any, config: PeftConfig) -> None:
        self.rows = RowTokenizer(tokenizer, config.train_on, config.max_seq_length)

    @property
    def renderer(self) -> ChatRenderer:
        """What renders the conversations."""
        return self.rows.renderer

    def examples(self, number: int, row: dict[str, Any]) -> list[list[Row]]:
        """Tokenize a row. A text may become several examples.

        Raises:
            BadData: The chat template refuses a conversation, or does not tell where an answer is.
        """
        return self.cut([(self.rows.whole(number, one), one) for one in conversations(row)], row)

    def cut(self, wholes: Sequence[tuple[Row, dict[str, Any]]], row: dict[str, Any]) -> list[list[Row]]:
        """Bring the sequences of a row within the limit.

        Args:
            wholes: Its sequences without a limit, each with the conversation that it is of.
            row: The row itself.
        """
        pieces = [self.rows.cut(whole, is_text="text" in one) for whole, one in wholes]
        if len(pieces) == 1 and "label" not in row:
            return [[piece] for piece in pieces[0]]
        liked = bool(row.get("label", True))
        return [[Row(piece.number, piece.ids, piece.labels, piece.truncated, liked) for (piece,) in pieces]]


def teaches(example: Sequence[Row]) -> bool:
    """Tell whether an example has something to learn: each answer a token, and a pair two answers that differ.

    Cut to the limit, two answers may begin behind it or be the same.
    """
    same = len(example) == 2 and example[0].ids == example[1].ids
    return all(row.trained_tokens for row in example) and not same
