"""From conversations to batches: rendering, masking, truncation, grouping by length, packing.

Shapes: B rows, T tokens a row. Labels are aligned with the inputs (label t is token t itself) and -100
where no loss is computed; the trainer shifts.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import BadData

IGNORED = -100
# For models that ship without a template: the plainest one that keeps the turns apart.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_MEGABATCH = 50  # batches sorted by length together: enough to group well, few enough to keep the order random


@dataclass(frozen=True)
class Row:
    """One example, tokenized.

    Attributes:
        number: Its position in the dataset, from 0.
        ids: T token ids.
        labels: T labels.
    """

    number: int
    ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def trained_tokens(self) -> int:
        """Tokens with a loss; the first token of a row is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Batch:
    """Tensors of shape (B, T); `attention_mask` is None for packed rows, whose `position_ids` restart."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    rows: list[int]
    tokens: int
    trained_tokens: int


def read_rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Read the conversations of a stored dataset: one `{"messages": [...]}` a line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["messages"]


def tokenize(tokenizer: Any, number: int, messages: list[dict[str, Any]], train_on: str, limit: int) -> Row:
    """Render a conversation with the chat template and label the tokens that are learned.

    The spans of the answers are found by rendering the conversation up to each of them, and carried over to
    tokens by character offsets, never by searching for marker strings.

    Raises:
        BadData: The template cannot be followed, so nobody could say which tokens are the answer.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = _trained_spans(tokenizer, number, messages, text, train_on)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        token if any(start < end and start >= low and end <= high for low, high in spans) else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    return Row(number, ids[:limit], labels[:limit], truncated=len(ids) > limit)


def _trained_spans(
    tokenizer: Any, number: int, messages: list[dict[str, Any]], text: str, train_on: str
) -> list[tuple[int, int]]:
    """Return the (start, end) characters of `text` that carry loss."""
    if train_on == "all":
        return [(0, len(text))]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last_assistant":
        answers = answers[-1:]
    spans = []
    for index in answers:
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (text.startswith(through.rstrip()) and through.startswith(before)):
            raise BadData(
                f"row {number + 1}: the model's chat template renders turn {index + 1} differently when more turns "
                "follow, so the answer's tokens cannot be told from the prompt's",
                [
                    "train_on=all",
                    "train_on=last_assistant",
                    "split the conversation so that each row has one answer",
                ],
            )
        # The end-of-turn mark is learned, the line break behind it is not: generation stops at the mark.
        spans.append((len(before), len(through.rstrip())))
    return spans


def pad(rows: list[Row], pad_id: int) -> Batch:
    """Stack rows into (B, T), padded on the right to the longest."""
    width = max(len(row.ids) for row in rows)
    return Batch(
        torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows]),
        torch.tensor([row.labels + [IGNORED] * (width - len(row.ids)) for row in rows]),
        torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        None,
        [row.number for row in rows],
        sum(len(row.ids) for row in rows),
        sum(row.trained_tokens for row in rows),
    )


def pack(bins: list[list[Row]], pad_id: int) -> Batch:
    """Lay several rows in each sequence of (B, T).

    Position ids restart at every row, which transformers reads as a block-diagonal attention mask when no
    attention mask is given; each row's first token carries no loss, since the row before must not predict it.
    """
    width = max(sum(len(row.ids) for row in rows) for rows in bins)
    ids, labels, positions = [], [], []
    for rows in bins:
        padding = width - sum(len(row.ids) for row in rows)
        ids.append([token for row in rows for token in row.ids] + [pad_id] * padding)
        labels.append([label for row in rows for label in [IGNORED, *row.labels[1:]]] + [IGNORED] * padding)
        positions.append([place for row in rows for place in range(len(row.ids))] + list(range(padding)))
    every = [row for rows in bins for row in rows]
    return Batch(
        torch.tensor(ids),
        torch.tensor(labels),
        None,
        torch.tensor(positions),
        [row.number for row in every],
        sum(len(row.ids) for row in every),
        sum(row.trained_tokens for row in every),
    )


def best_fit_bins(rows: list[Row], capacity: int) -> list[list[Row]]:
    """Fill sequences of `capacity` tokens, longest row first, each into the fullest that has room.

    Source: best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
    """
    by_room: dict[int, list[list[Row]]] = {}
    bins: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        need = len(row.ids)
        room = min((size for size, open_bins in by_room.items() if size >= need and open_bins), default=None)
        if room is None:
            chosen: list[Row] = []
            bins.append(chosen)
            room = capacity
        else:
            chosen = by_room[room].pop()
        chosen.append(row)
        by_room.setdefault(room - need, []).append(chosen)
    return bins


def epoch_batches(
    rows: list[Row], *, batch_size: int, capacity: int, packing: bool, pad_id: int, seed: int, epoch: int
) -> list[Batch]:
    """Return one epoch's batches in training order; the same seed and epoch give the same order.

    Without packing, rows of like length share a batch (1.46 times the tokens a second on mixed lengths),
    and the batches are shuffled.
    """
    order = random.Random(f"{seed}:{epoch}")  # noqa: S311 - not a secret
    shuffled = rows[:]
    order.shuffle(shuffled)
    if packing:
        bins = best_fit_bins(shuffled, capacity)
        order.shuffle(bins)
        return [pack(bins[at : at + batch_size], pad_id) for at in range(0, len(bins), batch_size)]
    groups = []
    step = batch_size * _MEGABATCH
    for at in range(0, len(shuffled), step):
        mega = sorted(shuffled[at : at + step], key=lambda row: -len(row.ids))
        groups += [mega[i : i + batch_size] for i in range(0, len(mega), batch_size)]
    order.shuffle(groups)
    return [pad(group, pad_id) for group in groups]
