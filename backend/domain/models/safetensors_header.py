"""The header of a safetensors file: which tensors it holds, without reading one of them.

Source: the format's description and the validation of its reference implementation,
https://github.com/huggingface/safetensors (README.md, "Format"; safetensors/src/tensor.rs, `Metadata::validate`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

LENGTH_BYTES = 8  # the header's length, an unsigned little-endian integer, comes first
MAX_HEADER_BYTES = 100_000_000  # MAX_HEADER_SIZE of the reference implementation
_MAX_ELEMENTS = 2**63
_MAX_DIMENSIONS = 64  # torch's own limit; also keeps a hostile product short
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a header says.

    Attributes:
        shapes: Tensor name → dimensions.
        parameters_by_dtype: The format's dtype name → elements.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parameters_by_dtype: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(self.parameters_by_dtype.values())


def header_length(prefix: bytes) -> int:
    """Return the length in bytes of the JSON that follows the first eight bytes.

    Args:
        prefix: The file's first eight bytes, or more.

    Raises:
        ValueError: The file is shorter than that, or the length is not one a header can have.
    """
    if len(prefix) < LENGTH_BYTES:
        raise ValueError(f"a safetensors file begins with {LENGTH_BYTES} bytes of length, this has {len(prefix)} bytes")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError(f"a safetensors header of {length} bytes is not possible")
    return length


def parse_header(header: bytes, data_bytes: int) -> SafetensorsHeader:
    """Parse the JSON of a header and check it against the data that should follow.

    Args:
        header: The JSON, `header_length` bytes.
        data_bytes: Bytes in the file after the header.

    Raises:
        ValueError: It is not a header, tensors overlap or leave gaps, or the file is truncated or too long.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"a safetensors header of {len(header)} bytes is not possible")
    if not header.startswith(b"{"):
        raise ValueError("a safetensors header begins with '{'")
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:  # deep nesting; a header has three levels
        raise ValueError("a safetensors header is not nested that deeply") from error
    entries.pop("__metadata__", None)
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        dtype, shape, span = _tensor(name, entry)
        shapes[name] = shape
        counts[dtype] = counts.get(dtype, 0) + _elements(name, shape)
        spans.append((*span, name))
    _check_layout(spans, data_bytes)
    return SafetensorsHeader(shapes, counts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a safetensors header names the same key twice")
    return entries


def _tensor(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r} is not described by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {name!r} has no dtype")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has no possible shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has no possible data offsets")
    bits = _BITS.get(dtype)  # a dtype newer than this table is counted, its size is not checked
    stored = offsets[1] - offsets[0]
    if bits is not None and stored * 8 != _elements(name, tuple(shape)) * bits:
        raise ValueError(f"tensor {name!r}: {stored} bytes are not what its shape and dtype need")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_ELEMENTS for item in value)


def _elements(name: str, shape: tuple[int, ...]) -> int:
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements >= _MAX_ELEMENTS:
            raise ValueError(f"tensor {name!r} has no possible shape")
    return elements


def _check_layout(spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Check that the tensors fill the file without gaps. A gap could hide data, and an overlap could alias it."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"tensor {name!r} overlaps its neighbour or leaves a gap")
        position = end
    if position != data_bytes:
        raise ValueError(f"the header describes {position} bytes of tensors, the file has {data_bytes}")
