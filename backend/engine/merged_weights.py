"""A base's tensors with an adapter merged into them, computed one at a time. The base itself does not change."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from engine.base import Base
from engine.errors import BadSetting
from engine.frozen_weights import plain_weight

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_QUANTISED = {"Params4bit": "4-bit NF4", "Int8Params": "8-bit"}  # bitsandbytes' classes of weights


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model.

    Attributes:
        host: The module that holds it, below any adapter.
        layer: The adapted layer around the host, if there is one.
        attribute: The tensor's name in the host.
        dtype: The type that it is written as.
    """

    host: nn.Module
    layer: LoraLayer | None
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Its size in the file."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@contextmanager
def adapter_attached(base: Base, name: str, path: Path) -> Iterator[None]:
    """Put an adapter on the base for the length of the block. One that was there before stays there afterwards."""
    there = name in base.adapters
    base.attach(name, path)
    try:
        yield
    finally:
        if not there:
            base.detach(name)


class MergedWeights:
    """The tensors, by the names that the model's own files give them.

    Args:
        base: Holds the adapter.
        adapter: The adapter's name on the base.

    Attributes:
        tensors: In the model's order. Of tied tensors it has the one that is saved.
        untied: Whether tied tensors are written separately, because the adapter changes only one of them.
        notes: What a user should know about how they are computed.
    """

    def __init__(self, base: Base, adapter: str) -> None:
        self.adapter = adapter
        self.model: Any = base.model.get_base_model()
        self._stored = stored_dtypes(base.path)
        self.dtype = self._written_dtype(base.path)
        self.untied = False
        self.tensors = dict(self._find())
        self.adapted_layers = sum(tensor.layer is not None for tensor in self.tensors.values())
        self.notes = self._notes()

    @property
    def total_bytes(self) -> int:
        """The size of all tensors as they are written."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def compute(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return one tensor, on the CPU.

        Args:
            name: The tensor's name.
            dtype: Its type; the type in the base's own files if None.

        Raises:
            BadSetting: It has values that the type cannot hold.
        """
        tensor = self.tensors[name]
        dtype = dtype or tensor.dtype
        with torch.no_grad():
            if tensor.attribute != "weight":
                value = getattr(tensor.host, tensor.attribute).detach()
            elif tensor.layer is None:
                value = plain_weight(tensor.host)
            else:
                value = merged_weight(tensor.layer, self.adapter)
            value = value.to("cpu", dtype, copy=True).contiguous()
        if dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise BadSetting(f"{name} is not finite once merged and written as {_name(dtype)}")
        return value

    def _find(self) -> Iterator[tuple[str, MergedTensor]]:
        adapted: str | None = None
        seen: dict[int, list[tuple[str, MergedTensor]]] = {}
        for path, module in self.model.named_modules():
            if adapted is not None and path.startswith(adapted):
                continue  # the layer below an adapter, and the adapter's own: they are one tensor with it
            layer = module if isinstance(module, LoraLayer) else None
            adapted = f"{path}." if layer is not None else None
            host = module.get_base_layer() if layer is not None else module
            carries = layer is not None and self.adapter in layer.scaling
            for attribute, value in _own_tensors(host):
                name = f"{path}.{attribute}" if path else attribute
                corrected = layer if carries and attribute == "weight" else None
                shape = _logical_shape(host, attribute, value)
                tensor = MergedTensor(host, corrected, attribute, shape, self._dtype_of(name, value))
                seen.setdefault(id(value), []).append((name, tensor))
        for sharing in seen.values():
            yield from self._saved(sharing)

    def _saved(self, sharing: list[tuple[str, MergedTensor]]) -> list[tuple[str, MergedTensor]]:
        """Return which of the tensors that share memory are saved: one, unless the adapter changes some alone."""
        if len(sharing) == 1:
            return sharing
        if any(tensor.layer is not None for _, tensor in sharing):
            self.untied = True
            return sharing
        derived = getattr(self.model, "all_tied_weights_keys", {})
        return [next((item for item in sharing if item[0] not in derived), sharing[0])]

    def _dtype_of(self, name: str, value: torch.Tensor) -> torch.dtype:
        if type(value).__name__ in _QUANTISED:
            return self.dtype
        if not value.is_floating_point():
            return value.dtype
        return self._stored.get(name, self.dtype)

    def _written_dtype(self, path: Path) -> torch.dtype:
        """Return the base's own type; for a base that is stored in fewer bits, the 16-bit type that it computes in."""
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        if isinstance(named, torch.dtype):
            return named
        kinds = set(self._stored.values())
        return kinds.pop() if len(kinds) == 1 else torch.bfloat16

    def _notes(self) -> list[str]:
        quantised = {
            words
            for tensor in self.tensors.values()
            if (words := _QUANTISED.get(type(getattr(tensor.host, tensor.attribute)).__name__)) is not None
        }
        notes = [
            f"The base was held in {words} while the adapter was trained, and the adapter corrects those rounded "
            "weights. They are what it was merged into, dequantised: merged into the weights before rounding, it "
            "would give other answers than it does."
            for words in sorted(quantised)
        ]
        if self.untied:
            notes.append("The output head and the input embedding were one tensor; the adapter changes one of them.")
        return notes


def merged_weight(layer: LoraLayer, adapter: str) -> torch.Tensor:
    """Return an adapted layer's weight with the adapter merged into it as PEFT does, in fp32."""
    weight = plain_weight(layer.get_base_layer()).to(torch.float32)
    variant = layer.lora_variant.get(adapter)
    if variant is None:
        return weight + layer.get_delta_weight(adapter).to(torch.float32)
    merged: torch.Tensor = variant.merge_safe(layer, adapter, weight)
    layer._caches.pop(f"{adapter}-weight_norm", None)  # kept by PEFT for undoing a merge that is not done here
    return merged


def stored_dtypes(folder: Path) -> Mapping[str, torch.dtype]:
    """Return the floating-point types of the tensors in a folder's safetensors files, by name."""
    dtypes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                dtype = _STORED.get(tensors.get_slice(name).get_dtype())
                if dtype is not None:
                    dtypes[name] = dtype
    return dtypes


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _logical_shape(host: nn.Module, attribute: str, value: torch.Tensor) -> tuple[int, ...]:
    """Return a tensor's shape; one that packs two values in each byte shows another."""
    state = getattr(value, "quant_state", None)
    return tuple(state.shape) if attribute == "weight" and state is not None else tuple(value.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
