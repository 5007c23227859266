import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.models.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, header_length, parse_header

WIDTH = {"F32": 4, "BF16": 2, "I8": 1}


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def encode(tensors: dict[str, Any]) -> bytes:
    return json.dumps(tensors).encode()


@given(
    st.dictionaries(
        st.text(min_size=1), st.tuples(st.sampled_from(sorted(WIDTH)), st.lists(st.integers(0, 9), max_size=8))
    )
)
def test_every_valid_header_is_counted_exactly(tensors: dict[str, tuple[str, list[int]]]) -> None:
    tensors.pop("__metadata__", None)
    position = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * WIDTH[dtype]
        header[name] = entry(dtype, shape, (position, end))
        position = end

    parsed = parse_header(encode(header) + b"   ", position)  # padded, as the format allows

    assert parsed.shapes == {name: tuple(shape) for name, (_, shape) in tensors.items()}
    assert parsed.parameters == sum(math.prod(shape) for _, shape in tensors.values())
    assert set(parsed.parameters_by_dtype) == {dtype for dtype, _ in tensors.values()}


@given(st.binary(max_size=400), st.integers(0, 2**40))
def test_arbitrary_bytes_raise_nothing_but_value_error(data: bytes, data_bytes: int) -> None:
    for attempt in (lambda: header_length(data), lambda: parse_header(data, data_bytes)):
        try:
            attempt()
        except ValueError:
            continue


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
near_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "NEW"]) | json_values,
        "shape": st.lists(st.integers(-2, 2**64)) | json_values,
        "data_offsets": st.lists(st.integers(-2, 64), max_size=3) | json_values,
    },
)


@given(st.dictionaries(st.text(), near_entries | json_values, max_size=4), st.integers(0, 64))
def test_any_json_object_raises_nothing_but_value_error(tensors: dict[str, Any], data_bytes: int) -> None:
    try:
        parse_header(encode(tensors), data_bytes)
    except ValueError:
        return


def test_deep_nesting_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested"):
        parse_header(b'{"a":' + b"[" * 200_000, 0)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_impossible_lengths_are_refused_before_anything_is_read(length: int) -> None:
    with pytest.raises(ValueError, match="not possible"):
        header_length(struct.pack("<Q", length))


def test_the_length_is_little_endian() -> None:
    assert header_length(struct.pack("<Q", 513) + b"rest") == 513
    assert LENGTH_BYTES == 8


@pytest.mark.parametrize(
    ("tensors", "data_bytes", "reason"),
    [
        ({"a": entry(), "b": entry(offsets=(12, 36))}, 36, "overlaps"),
        ({"a": entry(), "b": entry(offsets=(30, 54))}, 54, "gap"),
        ({"a": entry()}, 23, "describes 24"),
        ({"a": entry()}, 25, "describes 24"),
        ({"a": entry(offsets=(0, 20))}, 20, "not what its shape"),
        ({"a": entry(offsets=(24, 0))}, 24, "offsets"),
        ({"a": entry(shape=(2, -3))}, 24, "shape"),
        ({"a": entry(shape=(True, 6))}, 24, "shape"),
        ({"a": entry(shape=(2**62, 2**62))}, 24, "shape"),
        ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "dtype"),
        ({"a": 3}, 4, "object"),
    ],
)
def test_what_a_reader_could_be_misled_by_is_refused(tensors: dict[str, Any], data_bytes: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_header(encode(tensors), data_bytes)


def test_a_key_named_twice_is_refused() -> None:
    one = json.dumps(entry())
    with pytest.raises(ValueError, match="twice"):
        parse_header(f'{{"a":{one},"a":{one}}}'.encode(), 24)


def test_a_dtype_newer_than_the_table_is_counted() -> None:
    assert parse_header(encode({"a": entry("F2", (8,), (0, 2))}), 2).parameters_by_dtype == {"F2": 8}
