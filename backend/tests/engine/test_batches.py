"""Masking, padding, packing and order."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.batches import Batch, Grouping, RowTokenizer, best_fit, epoch_batches, pack, pad
from engine.rows import IGNORED, Row, RowStore

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick?"},
    {"role": "assistant", "content": "brown fox"},
    {"role": "user", "content": "and the user|> assistant?"},
    {"role": "assistant", "content": "lazy dog"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tiny_path)


def tokenize(tokenizer: AutoTokenizer, train_on: str, limit: int) -> Row:
    (row,) = RowTokenizer(tokenizer, train_on, limit).rows(0, {"messages": TURNS})
    return row


def _trained_text(tokenizer: AutoTokenizer, train_on: str) -> str:
    row = tokenize(tokenizer, train_on, 256)
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("assistant", "brown fox<|end|>lazy dog<|end|>"),
        ("last_assistant", "lazy dog<|end|>"),
    ],
)
def test_exactly_the_answers_and_their_ends_carry_loss(tokenizer: AutoTokenizer, train_on: str, trained: str) -> None:
    assert _trained_text(tokenizer, train_on) == trained


def test_train_on_all_trains_every_token(tokenizer: AutoTokenizer) -> None:
    row = tokenize(tokenizer, "all", 256)
    assert row.labels == row.ids
    assert row.trained_tokens == len(row.ids) - 1  # nothing predicts the first


def test_truncation_is_at_the_limit_and_said(tokenizer: AutoTokenizer) -> None:
    row = tokenize(tokenizer, "assistant", 10)
    assert (len(row.ids), row.truncated) == (10, True)
    assert not tokenize(tokenizer, "assistant", 256).truncated


@given(st.text(min_size=1, max_size=300), st.integers(8, 64))
def test_a_text_is_cut_into_rows_and_nothing_of_it_is_lost(tokenizer: AutoTokenizer, text: str, limit: int) -> None:
    rows = RowTokenizer(tokenizer, "all", limit).rows(3, {"text": text})
    whole = RowTokenizer(tokenizer, "all", limit).whole(3, {"text": text})
    assert [token for row in rows for token in row.ids] == whole.ids
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole.ids[:-1]) == text
    assert all(row.labels == row.ids and row.number == 3 and not row.truncated for row in rows)
    assert max(len(row.ids) for row in rows) <= limit
    assert min(row.trained_tokens for row in rows) >= 1


def bins_of(rows: list[Row]) -> list[list[Row]]:
    return [[rows[at] for at in bin_] for bin_ in best_fit([len(row.ids) for row in rows], 40)]


def batches_of_lists(rows: list[Row], batch_size: int, packing: bool, seed: int, epoch: int) -> list[Batch]:
    """An epoch by lists of rows, all at once: plain, and heavy on memory."""
    order = random.Random(f"{seed}:{epoch}")
    shuffled = rows[:]
    order.shuffle(shuffled)
    if packing:
        bins = bins_of(shuffled)
        order.shuffle(bins)
        return [pack(bins[at : at + batch_size], 0) for at in range(0, len(bins), batch_size)]
    groups = []
    for at in range(0, len(shuffled), batch_size * 50):
        mega = sorted(shuffled[at : at + batch_size * 50], key=lambda row: -len(row.ids))
        groups += [mega[i : i + batch_size] for i in range(0, len(mega), batch_size)]
    order.shuffle(groups)
    return [pad(group, 0) for group in groups]


rows_of_any_length = st.lists(st.integers(2, 40), min_size=1, max_size=60).map(
    lambda lengths: [Row(i, [1] * n, [IGNORED] + [1] * (n - 1), False) for i, n in enumerate(lengths)]
)


@given(rows_of_any_length, st.integers(1, 7), st.booleans(), st.integers(0, 5))
def test_an_epoch_has_every_row_once_and_the_same_order_for_the_same_seed(
    rows: list[Row], batch_size: int, packing: bool, seed: int
) -> None:
    def order() -> list[list[int]]:
        return [
            batch.rows
            for batch in epoch_batches(RowStore(rows), Grouping(batch_size, 40, packing, 0), seed=seed, epoch=0)
        ]

    first = order()
    assert sorted(number for batch in first for number in batch) == [row.number for row in rows]
    assert order() == first


rows_of_any_kind = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=40), st.integers(1, 39), st.booleans()),
    min_size=1,
    max_size=150,
).map(
    lambda rows: [
        Row(3 * number, ids, [IGNORED] * min(cut, len(ids) - 1) + ids[min(cut, len(ids) - 1) :], truncated)
        for number, (ids, cut, truncated) in enumerate(rows)
    ]
)


@given(rows_of_any_kind, st.integers(1, 3), st.booleans(), st.integers(0, 5), st.integers(0, 2))
def test_rows_in_a_store_make_the_same_batches_to_the_bit(
    rows: list[Row], batch_size: int, packing: bool, seed: int, epoch: int
) -> None:
    store = RowStore(rows)
    assert list(store) == rows and store[-1] == rows[-1] and store[1:3] == rows[1:3]
    assert store.lengths() == [len(row.ids) for row in rows]
    assert store.trained_tokens == sum(row.trained_tokens for row in rows)
    assert store.truncated == sum(row.truncated for row in rows)
    plain = batches_of_lists(rows, batch_size, packing, seed, epoch)
    found = epoch_batches(store, Grouping(batch_size, 40, packing, 0), seed=seed, epoch=epoch)
    assert len(found) == len(plain)
    for one, other in zip(found, plain, strict=True):
        assert (one.rows, one.tokens, one.trained_tokens) == (other.rows, other.tokens, other.trained_tokens)
        for name in ("input_ids", "labels", "attention_mask", "position_ids"):
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None and second is None) or (first.dtype == second.dtype and torch.equal(first, second))


@given(rows_of_any_length)
def test_bins_never_overflow_and_no_two_could_be_one(rows: list[Row]) -> None:
    sizes = [sum(len(row.ids) for row in rows) for rows in bins_of(rows)]
    assert max(sizes) <= 40
    assert sum(size <= 20 for size in sizes) <= 1


@given(rows_of_any_length)
def test_packing_and_padding_train_the_same_tokens(rows: list[Row]) -> None:
    packed, padded = pack(bins_of(rows), 0), pad(rows, 0)
    assert packed.trained_tokens == padded.trained_tokens == int((packed.labels[:, 1:] != IGNORED).sum())
    assert int((padded.labels[:, 1:] != IGNORED).sum()) == padded.trained_tokens
    assert packed.tokens == padded.tokens


def test_packed_rows_do_not_see_each_other(tiny_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(i, ids := torch.randint(4, 300, (n,), generator=generator).tolist(), ids, False)
        for i, n in enumerate([17, 9, 5, 30])
    ]
    bins = bins_of(rows)
    batch = pack(bins, 0)
    with torch.no_grad():
        together = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for line, members in enumerate(bins):
            start = 0
            for row in members:
                alone = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
                part = together[line, start : start + len(row.ids)]
                assert torch.allclose(part, alone, atol=5e-5), (line, row.number)
                start += len(row.ids)
