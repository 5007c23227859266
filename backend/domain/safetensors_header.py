"""Reads a safetensors header: names, types and shapes, without the weights."""

import json
import math
from collections.abc import Mapping
from typing import BinaryIO

# Bytes an element. Source: the dtype table of the safetensors format.
DTYPE_BYTES: Mapping[str, float] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_LONGEST = 100 * 2**20  # the format's own limit


def parameters_by_dtype(file: BinaryIO) -> dict[str, int]:
    """Count the elements of each type.

    Raises:
        ValueError: The header is malformed.
    """
    counts: dict[str, int] = {}
    for dtype, shape in read_header(file).values():
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return counts


def read_header(file: BinaryIO) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return tensor name → (dtype, shape).

    Raises:
        ValueError: The header is too long, cut, not JSON, or contradicts itself.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError("shorter than the header's length field")
    length = int.from_bytes(prefix, "little")
    if length > _LONGEST:
        raise ValueError(f"a header of {length} bytes is over the format's limit")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("the header is cut off")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    return {str(name): _tensor(name, entry) for name, entry in header.items() if name != "__metadata__"}


def _tensor(name: str, entry: object) -> tuple[str, tuple[int, ...]]:
    if not isinstance(entry, dict):
        raise ValueError(f"{name!r:.80} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name!r:.80} has the unknown type {dtype!r:.40}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError(f"{name!r:.80} has no shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(place) is int for place in offsets):
        raise ValueError(f"{name!r:.80} has no offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name!r:.80}: its offsets do not fit its shape")
    return dtype, tuple(shape)
