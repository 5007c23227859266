"""Chunks of trained tokens."""

from hypothesis import given
from hypothesis import strategies as st

from domain.memory.loss_chunks import chunks, most_tokens


@given(tokens=st.integers(1, 100_000), most=st.integers(1, 5_000))
def test_chunks_follow_one_another_and_are_as_few_and_as_equal_as_can_be(tokens: int, most: int) -> None:
    bounds = chunks(tokens, most)
    assert [low for low, _ in bounds] == [0, *(high for _, high in bounds[:-1])]
    assert bounds[-1][1] == tokens
    sizes = [high - low for low, high in bounds]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert (len(sizes) - 1) * most < tokens


@given(vocabulary=st.integers(100, 1_000_000), on_gpu=st.booleans())
def test_a_larger_vocabulary_has_chunks_of_no_more_tokens(vocabulary: int, on_gpu: bool) -> None:
    tokens = most_tokens(vocabulary, on_gpu=on_gpu)
    assert most_tokens(2 * vocabulary, on_gpu=on_gpu) <= tokens
    assert tokens >= (256 if on_gpu else 128)
