"""From conversations to batches: rendering, masking, truncation, grouping by length, packing.

Shapes: B rows, T tokens a row. Labels are aligned with the inputs (label t is token t itself) and -100
where no loss is computed; the trainer shifts.
"""

import json
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

from domain.peft.config import PeftConfig
from domain.peft.objectives import SPECS as OBJECTIVES
from engine.rendering import ChatRenderer, Rendered
from engine.rows import IGNORED, Row, RowStore
from engine.text_tokens import TextTokenizer

# For models without a template: the plainest one that keeps the turns apart.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_T = TypeVar("_T")
_MEGABATCH = 50  # batches sorted by length together: enough to group well, few enough to keep the order random


@dataclass(frozen=True)
class Encoded:
    """A row's text, its T tokens, their labels, and the (start, end) characters of each."""

    text: str
    ids: list[int]
    labels: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """Tensors of shape (B, T); `attention_mask` is None for packed rows, whose `position_ids` restart.

    Attributes:
        rows: The number of each row in the dataset, in the order in which their tokens stand in the tensors.
        lengths: The tokens of each row, for each of the B sequences.
        examples: What the rows make up: rows, or pairs of a better and a worse answer.
        liked: Whether each row is a good answer.
        mismatched: The same prompts, each with the answer of another row.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    rows: list[int]
    tokens: int
    trained_tokens: int
    lengths: list[list[int]]
    examples: int
    liked: list[bool]
    mismatched: "Batch | None" = None

    def row_of_each_token(self) -> torch.Tensor:
        """Return, as (B, T), which of `rows` each token belongs to; that of the padding has no meaning."""
        index = torch.zeros_like(self.input_ids)
        number = 0
        for line, lengths in zip(index, self.lengths, strict=True):
            at = 0
            for length in lengths:
                line[at : at + length] = number
                at, number = at + length, number + 1
        return index


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the normal rows of a stored dataset: a conversation or a text a line."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


class RowTokenizer:
    """Turns rows into token ids and labels.

    Args:
        train_on: Which tokens of a conversation are learned; of a text, all are.
        limit: Tokens a row. A longer conversation is truncated, a longer text becomes several rows.
    """

    def __init__(self, tokenizer: Any, train_on: str, limit: int) -> None:
        self._tokenizer, self._train_on, self._limit = tokenizer, train_on, limit
        self._renderer, self._text = ChatRenderer(tokenizer), TextTokenizer(tokenizer)

    @property
    def renderer(self) -> ChatRenderer:
        """What renders the conversations."""
        return self._renderer

    def rows(self, number: int, row: dict[str, Any]) -> list[Row]:
        """Tokenize a row.

        Raises:
            BadData: The chat template refuses the conversation, or does not tell where an answer is.
        """
        return self.cut(self.whole(number, row), is_text="text" in row)

    def cut(self, whole: Row, *, is_text: bool) -> list[Row]:
        """Bring a row within the limit. A conversation loses its end; a text becomes several rows of similar length.

        No part of a text is lost, and none of its rows is too short to learn from.
        """
        ids, labels, limit = whole.ids, whole.labels, self._limit
        if not is_text:
            return [Row(whole.number, ids[:limit], labels[:limit], len(ids) > limit)]
        pieces = max(1, -(-len(ids) // limit))
        bounds = [len(ids) * piece // pieces for piece in range(pieces + 1)]
        return [Row(whole.number, ids[low:high], labels[low:high], False) for low, high in pairwise(bounds)]

    def whole(self, number: int, row: dict[str, Any]) -> Row:
        """Tokenize a row without a limit.

        Raises:
            BadData: As for `rows`.
        """
        encoded = self.encode(number, row)
        return Row(number, encoded.ids, encoded.labels, truncated=False)

    def encode(self, number: int, row: dict[str, Any]) -> Encoded:
        """Tokenize a row without a limit, with the place of each token in the text.

        Raises:
            BadData: As for `rows`.
        """
        if "text" in row:
            return self._encode_text(row["text"])
        messages = row["messages"]
        answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        unwanted = [index for index in answers if messages[index].get("weight", 1) == 0]
        wanted = {"all": [], "last_assistant": answers[-1:], "assistant": answers}[self._train_on]
        rendered = self._renderer.render(number, row, {*wanted, *unwanted})
        encoded = self._tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        learned = [self._train_on == "all"] * len(ids)
        for indices, value in ((wanted, True), (unwanted, False)):
            for low, high in tokens_of(rendered, indices, offsets):
                learned[low:high] = [value] * (high - low)
        labels = [token if learned[at] else IGNORED for at, token in enumerate(ids)]
        return Encoded(rendered.text, ids, labels, offsets)

    def _encode_text(self, text: str) -> Encoded:
        encoded = self._text(text)
        ids, offsets = encoded.ids, encoded.offsets
        end = self._tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids, offsets = [*ids, end], [*offsets, (len(text), len(text))]
        return Encoded(text, ids, ids[:], offsets)


def tokens_of(rendered: Rendered, turns: Iterable[int], offsets: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the first token and the token behind the last one of each turn that the template does not leave out.

    Args:
        offsets: Each token's (start, end) characters.
    """
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for turn in turns:
        span = rendered.spans[turn]
        if span is None:
            continue
        low = bisect_right(ends, span.start) if span.cuts_start else bisect_left(starts, span.start)
        high = bisect_right(ends, span.end)
        # The end-of-turn mark is learned, the line break behind it is not: generation stops at the mark.
        while span.cuts_end and high > low and not rendered.text[starts[high - 1] : ends[high - 1]].strip():
            high -= 1
        yield low, max(low, high)


def pad(rows: list[Row], pad_id: int, per_example: int = 1) -> Batch:
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
        [[len(row.ids)] for row in rows],
        len(rows) // per_example,
        [row.liked for row in rows],
    )


def pack(bins: list[list[Row]], pad_id: int, per_example: int = 1) -> Batch:
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
        [[len(row.ids) for row in rows] for rows in bins],
        len(every) // per_example,
        [row.liked for row in every],
    )


def with_mismatched(batch: Batch, rows: list[Row], pad_id: int, capacity: int, *, packing: bool) -> Batch:
    """Add the same prompts with the answer of the row before each; the first gets the last one's.

    KTO measures on them how far the model has moved from the base in general. Source: arXiv 2402.01306, section 4.1.

    Args:
        rows: Those of the batch.
        capacity: Tokens that a row may have.
    """
    others = [_with_answer_of(row, rows[at - 1], capacity) for at, row in enumerate(rows)]
    if not packing:
        return replace(batch, mismatched=pad(others, pad_id))
    bins = best_fit([len(row.ids) for row in others], capacity)
    return replace(batch, mismatched=pack([[others[at] for at in bin_] for bin_ in bins], pad_id))


def _with_answer_of(row: Row, other: Row, capacity: int) -> Row:
    """Join the prompt of a row and the answer of another. The answer begins with the first learned token."""
    prompt = next(at for at, label in enumerate(row.labels) if label != IGNORED)
    answer = next(at for at, label in enumerate(other.labels) if label != IGNORED)
    ids = [*row.ids[:prompt], *other.ids[answer:]][:capacity]
    labels = [*row.labels[:prompt], *other.labels[answer:]][:capacity]
    return Row(row.number, ids, labels, row.truncated)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill bins of a capacity, the largest item first, each into the fullest bin that has room.

    Returns:
        The positions of each bin's items.

    Source: best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
    """
    by_room: dict[int, list[list[int]]] = {}
    bins: list[list[int]] = []
    for position in sorted(range(len(sizes)), key=lambda position: -sizes[position]):
        need = sizes[position]
        room = min((size for size, open_bins in by_room.items() if size >= need and open_bins), default=None)
        if room is None:
            chosen: list[int] = []
            bins.append(chosen)
            room = capacity
        else:
            chosen = by_room[room].pop()
        chosen.append(position)
        by_room.setdefault(room - need, []).append(chosen)
    return bins


class Batches(Sequence[Batch]):
    """An epoch's batches. Each is made when it is asked for: all together they would take over 24 bytes a token."""

    def __init__(self, groups: Sequence[_T], make: Callable[[_T], Batch]) -> None:
        self._groups, self._make = groups, make

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, position: int) -> Batch: ...
    @overload
    def __getitem__(self, position: slice) -> list[Batch]: ...
    def __getitem__(self, position: int | slice) -> Batch | list[Batch]:
        if isinstance(position, slice):
            return [self._make(group) for group in self._groups[position]]
        return self._make(self._groups[position])


@dataclass(frozen=True)
class Grouping:
    """How rows make up examples and examples batches.

    Attributes:
        batch_size: Examples a forward pass, or with packing sequences of several.
        capacity: Tokens that a row may have.
        packing: Whether several rows share a sequence.
        pad_id: Any token.
        per_example: 1, or 2 where the rows come in pairs: the better answer, then the worse one. Both are always in one
            batch, and with packing in one sequence.
        mismatched: Whether each batch also has the same prompts with other answers.
    """

    batch_size: int
    capacity: int
    packing: bool
    pad_id: int
    per_example: int = 1
    mismatched: bool = False

    def examples(self, rows: RowStore) -> list[list[int]]:
        """Return the positions of each example's rows."""
        return [list(range(at, at + self.per_example)) for at in range(0, len(rows), self.per_example)]

    def padded(self, rows: list[Row]) -> Batch:
        """Return the batch of some rows."""
        return self._completed(pad(rows, self.pad_id, self.per_example), rows)

    def packed(self, bins: list[list[Row]]) -> Batch:
        """Return the batch of some sequences of several rows each."""
        return self._completed(pack(bins, self.pad_id, self.per_example), [row for rows in bins for row in rows])

    def _completed(self, batch: Batch, rows: list[Row]) -> Batch:
        if not self.mismatched:
            return batch
        return with_mismatched(batch, rows, self.pad_id, self.capacity, packing=self.packing)


def grouping_of(config: PeftConfig, pad_id: int) -> Grouping:
    """Return how a run groups its rows."""
    pairs = OBJECTIVES[config.objective].sequences
    capacity, packing = config.max_seq_length, config.packing
    return Grouping(config.batch_size, capacity, packing, pad_id, pairs, mismatched=config.objective == "kto")


def epoch_batches(rows: RowStore, grouping: Grouping, *, seed: int, epoch: int) -> Batches:
    """Return one epoch's batches in training order; the same seed and epoch give the same order.

    Without packing, rows of like length share a batch (1.46 times the tokens a second on mixed lengths),
    and the batches are shuffled.
    """
    order = random.Random(f"{seed}:{epoch}")  # noqa: S311 - not a secret
    lengths, size = rows.lengths(), grouping.batch_size
    shuffled = grouping.examples(rows)
    order.shuffle(shuffled)
    if grouping.packing:
        sizes = [sum(lengths[at] for at in example) for example in shuffled]
        bins = [
            [at for number in bin_ for at in shuffled[number]]
            for bin_ in best_fit(sizes, grouping.capacity * grouping.per_example)
        ]
        order.shuffle(bins)
        packs = [bins[at : at + size] for at in range(0, len(bins), size)]
        return Batches(packs, lambda group: grouping.packed([[rows[at] for at in bin_] for bin_ in group]))
    groups = []
    step = size * _MEGABATCH
    for at in range(0, len(shuffled), step):
        mega = sorted(shuffled[at : at + step], key=lambda example: -max(lengths[row] for row in example))
        groups += [mega[i : i + size] for i in range(0, len(mega), size)]
    order.shuffle(groups)
    return Batches(groups, lambda group: grouping.padded([rows[at] for example in group for at in example]))


def evaluation_batches(rows: RowStore, grouping: Grouping) -> Iterator[Batch]:
    """Yield batches of all rows, those of like length together, each when it is asked for."""
    lengths, size = rows.lengths(), grouping.batch_size
    by_length = sorted(grouping.examples(rows), key=lambda example: max(lengths[row] for row in example))
    for at in range(0, len(by_length), size):
        yield grouping.padded([rows[row] for example in by_length[at : at + size] for row in example])
