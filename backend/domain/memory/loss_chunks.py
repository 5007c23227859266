"""How many trained tokens have logits at once.

It follows from the vocabulary and the kind of device alone. What else the machine does must not change it: a run that
goes on from a checkpoint adds up the same sums.
"""

# Logits of a chunk in fp32. There are two tensors of that size at once.
_CHUNK_BYTES = 48 * 2**20
_CHUNK_BYTES_GPU = 128 * 2**20
# Fewer tokens, and a product with the head waits for its weights: on a CPU, and on a GPU.
_FEWEST, _FEWEST_GPU = 128, 256


def most_tokens(vocabulary: int, *, on_gpu: bool) -> int:
    """Return the trained tokens that one chunk has at most."""
    size, fewest = (_CHUNK_BYTES_GPU, _FEWEST_GPU) if on_gpu else (_CHUNK_BYTES, _FEWEST)
    return max(fewest, size // (4 * vocabulary) // 16 * 16)


def chunks(tokens: int, most: int) -> list[tuple[int, int]]:
    """Divide tokens into as few chunks as there can be, as equal as can be.

    Args:
        tokens: To divide.
        most: Tokens a chunk at most.

    Returns:
        The first token of each, and the one behind its last.
    """
    count = max(1, -(-tokens // most))
    return [(tokens * at // count, tokens * (at + 1) // count) for at in range(count)]
