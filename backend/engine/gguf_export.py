"""The `export_gguf` command: base and adapter become one file that llama.cpp reads."""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.constants import GGML_QUANT_VERSION
from gguf.quants import quant_shape_to_byte_shape, quantize

from core.errors import ExportRejected
from core.files import whole_folder
from core.manifest import write_manifest
from domain.exports import GgufFile
from domain.models.gguf import GgufModel, GgufType, read_gguf_model
from domain.protocol import ExportGguf, Progress
from engine.base import Base
from engine.channel import Channel
from engine.errors import BadSetting
from engine.gguf_tokenizer import GgufTokenizer, read_gguf_tokenizer
from engine.merge import merging_packages, require_embeddings, require_space, template_notes
from engine.merged_weights import MergedWeights, adapter_attached

_TYPES: dict[GgufType, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_FILE_TYPES: dict[GgufType, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_LARGEST_F16 = 65504.0
_METADATA_BYTES = 32 * 2**20  # for tokens, merges and their types; the largest vocabularies take half of it


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: its name there, its source, and how it is stored."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in bytes of a packed tensor, or in elements of any other."""
        packed = self.kind in (GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)
        return quant_shape_to_byte_shape(self.shape, self.kind) if packed else self.shape

    @property
    def size_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def export_gguf(base: Base, command: ExportGguf, channel: Channel) -> GgufFile:
    """Write the file.

    Raises:
        BadSetting: The adapter does not belong to this base; or llama.cpp has no such model or tokenizer.
        StorageFull: There is no room; nothing was written.
        Stopped: The client ended it; the file is deleted.
    """
    output = Path(command.output_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        model = read_gguf_model(json.loads((base.path / "config.json").read_text(encoding="utf-8")))
        with adapter_attached(base, command.adapter_id, Path(command.adapter_path)):
            merged = MergedWeights(base, command.adapter_id)
            tokenizer, notes = _tokenizer(base, command, output.parent, model)
            return _export(command, model, tokenizer, notes, merged, output, channel)
    except ExportRejected as error:
        raise BadSetting(error.detail) from error


def _tokenizer(base: Base, command: ExportGguf, scratch: Path, model: GgufModel) -> tuple[GgufTokenizer, list[str]]:
    """Return the tokenizer, and notes for the user."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".exp_tokenizer-", suffix=".tmp") as folder:
        served = base.tokenizers.written(Path(command.adapter_path), Path(folder))
        require_embeddings(served, model.vocabulary)
        return read_gguf_tokenizer(Path(folder), base.path, model.vocabulary, served.ends), template_notes(base, served)


def _export(
    command: ExportGguf,
    model: GgufModel,
    tokenizer: GgufTokenizer,
    notes: list[str],
    merged: MergedWeights,
    output: Path,
    channel: Channel,
) -> GgufFile:
    tensors = list(_plan(model, merged, command.quantization))
    total_bytes = sum(tensor.size_bytes for tensor in tensors)
    require_space(output.parent, total_bytes + _METADATA_BYTES)
    filename = (
        f"{_slug(command.base_model_id.rsplit('/', 1)[-1])}-{_slug(command.adapter_id)}-{command.quantization}.gguf"
    )
    kinds = [tensor.kind.name for tensor in tensors]
    result = GgufFile(
        filename=filename,
        size_bytes=total_bytes,
        tensors={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        pre_tokenizer=tokenizer.pre,
        adapted_layers=merged.adapted_layers,
        notes=[*_notes(merged, tensors, command.quantization), *model.notes, *notes],
    )
    with whole_folder(output) as folder:
        writer = GGUFWriter(folder / filename, model.architecture)
        try:
            _describe(writer, command, model)
            tokenizer.write(writer)
            _write_tensors(writer, tensors, model, merged, command.request_id, channel)
        finally:
            writer.close()
        about = command.about.model_dump() | result.as_json() | {"packages": merging_packages()}
        (folder / "export.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        channel.emit(Progress(request_id=command.request_id, stage="computing sums", fraction=None))
        write_manifest(folder, about)
    return result


def _notes(merged: MergedWeights, tensors: list[_Tensor], wanted: GgufType) -> list[str]:
    notes = list(merged.notes)
    kept = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor.kind != _TYPES[wanted]]
    if kept:
        notes.append(
            f"{len(kept)} tensors have rows that {wanted} cannot pack (no multiple of 32) and are stored as f16: "
            f"{', '.join(kept[:3])}{' …' if len(kept) > 3 else ''}."
        )
    return notes


def _plan(model: GgufModel, merged: MergedWeights, wanted: GgufType) -> Iterator[_Tensor]:
    """Yield the file's tensors in order. Vectors are f32 in every format, as llama.cpp's converter has them."""
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == model.architecture)
    names = get_tensor_name_map(MODEL_ARCH(architecture), model.layers)
    if model.rope.frequency_factors:
        yield _Tensor("rope_freqs.weight", None, (len(model.rope.frequency_factors),), GGMLQuantizationType.F32)
    for source, tensor in merged.tensors.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportRejected(f"The tensor {source} has no place in a {model.architecture} of llama.cpp.")
        yield _Tensor(name, source, tensor.shape, _kind(tensor.shape, _TYPES[wanted]))


def _kind(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _describe(writer: GGUFWriter, command: ExportGguf, model: GgufModel) -> None:
    writer.add_type("model")
    writer.add_name(f"{command.base_model_id} with {command.adapter_id}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, command.base_model_id)
    writer.add_finetune(command.adapter_id)
    writer.add_file_type(_FILE_TYPES[command.quantization])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_vocab_size(model.vocabulary)
    writer.add_layer_norm_rms_eps(model.rms_norm_epsilon)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_rope_freq_base(model.rope_base)
    if model.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(model.rope.kind))
        writer.add_rope_scaling_factor(model.rope.factor)
    if model.rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(model.rope.original_positions or model.positions))
        for name, value in model.rope.yarn.items():
            getattr(writer, f"add_rope_scaling_yarn_{name}")(value)


def _write_tensors(
    writer: GGUFWriter,
    tensors: list[_Tensor],
    model: GgufModel,
    merged: MergedWeights,
    request_id: str,
    channel: Channel,
) -> None:
    for tensor in tensors:
        packed = tensor.stored_shape != tensor.shape
        dtype = np.dtype(np.uint8 if packed else np.float16 if tensor.kind == GGMLQuantizationType.F16 else np.float32)
        raw = tensor.kind if packed else None
        writer.add_tensor_info(tensor.name, tensor.stored_shape, dtype, tensor.size_bytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(tensor.size_bytes for tensor in tensors)
    for tensor in tensors:
        channel.check_stop(request_id)
        writer.write_tensor_data(_packed(tensor, model, merged))
        done += tensor.size_bytes
        channel.emit(Progress(request_id=request_id, stage="writing", fraction=done / total))


def _packed(tensor: _Tensor, model: GgufModel, merged: MergedWeights) -> "np.ndarray[Any, Any]":
    if tensor.source is None:
        return np.array(model.rope.frequency_factors, dtype=np.float32)
    value = merged.compute(tensor.source, torch.float32)
    if model.permuted:
        if ".q_proj." in tensor.source:
            value = permuted(value, model.heads)
        elif ".k_proj." in tensor.source:
            value = permuted(value, model.kv_heads)
    if tensor.kind == GGMLQuantizationType.F16 and float(value.abs().max()) > _LARGEST_F16:
        raise BadSetting(f"{tensor.source} has values beyond {_LARGEST_F16:.0f}, the largest of f16; use bf16 or f32")
    return quantize(value.numpy(), tensor.kind)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q or k. transformers rotates the two halves of a head, llama.cpp neighbouring pairs.

    Args:
        weight: Of shape (heads · head size, in), or (heads · head size,) for a bias.
        heads: The number of heads of q, or of k.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
