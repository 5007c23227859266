"""How a checkpoint that is published quantised holds its weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from domain.models.config_reader import ConfigReader, NotKnown
from domain.models.shape import ModelShape, Stored

# Bits a weight, by `quant_method`, where the method leaves no choice.
_MXFP4_BITS = 4 + 8 / 32  # four bits, and one 8-bit scale for 32 weights (OCP Microscaling formats 1.0, section 5)
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # QLoRA, arXiv 2305.14314, section 3: double quantisation
_FP4_BITS = 4 + 32 / 64  # the same without double quantisation: one fp32 scale for 64 weights


def read_stored(config: Mapping[str, Any]) -> Stored | None:
    """Read `quantization_config`.

    Returns:
        The storage, or None where the weights are published as they are.

    Raises:
        NotKnown: They are quantised in a way whose size is not known here, or the section does not say in which.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, dict):
        raise NotKnown("quantization_config is no object")
    reader = ConfigReader(section)
    method, four, eight = reader.value("quant_method"), reader.flag("load_in_4bit"), reader.flag("load_in_8bit")
    if method == "bitsandbytes" or (method is None and (four or eight)):
        return _bitsandbytes(reader, four, eight)
    if method == "mxfp4":
        return Stored(method, _MXFP4_BITS)
    if method == "fp8":
        return Stored(method, _fp8_bits(reader))
    if method in ("gptq", "awq"):
        return Stored(method, _grouped_bits(reader))
    raise NotKnown(f"the quantisation {method!r}"[:200])


def _bitsandbytes(reader: ConfigReader, four: bool, eight: bool) -> Stored | None:
    """Four or eight bits as the switches say; with neither transformers quantises nothing (quantizers/auto.py)."""
    if four and eight:
        raise NotKnown("load_in_4bit and load_in_8bit at once")
    if eight:
        return Stored("bitsandbytes", 8.0)
    if four:
        return Stored("bitsandbytes", _NF4_BITS if reader.flag("bnb_4bit_use_double_quant") else _FP4_BITS)
    return None


def _fp8_bits(reader: ConfigReader) -> float:
    """Eight bits, and one fp32 scale a block (transformers, integrations/finegrained_fp8.py)."""
    block = reader.value("weight_block_size")
    if block is None:
        return 8.0
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise NotKnown("weight_block_size is no pair of sizes")
    return 8 + 32 / (int(block[0]) * int(block[1]))


def _grouped_bits(reader: ConfigReader) -> float:
    """Bits, and for each group of weights an fp16 scale and a zero point (GPTQ, AWQ)."""
    bits = reader.size("bits", "w_bit")
    group = reader.value("group_size", reader.value("q_group_size", 128))
    if type(group) is not int or group < -1 or group == 0 or bits > 16:
        raise NotKnown("a group of that size")
    return float(bits) if group == -1 else bits + (16 + bits) / int(group)


def read_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the type that the weights are published in, the text part's first; None if it is not said."""
    text = config.get("text_config")
    for section in (text if isinstance(text, Mapping) else {}, config):
        value = section.get("dtype") or section.get("torch_dtype")  # the latter until transformers 4.56
        if isinstance(value, str):
            return value
    return None


def as_published(shape: ModelShape, config: Mapping[str, Any]) -> ModelShape:
    """Add to a shape how the checkpoint with this config.json holds its weights.

    Raises:
        NotKnown: They are quantised in a way whose size is not known here.
    """
    return replace(shape, stored=read_stored(config), dtype=read_dtype(config))
