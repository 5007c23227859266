"""A base's tensors with an adapter merged into them, computed one at a time. The base itself does not change."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import nn

from engine.base import Base
from engine.errors import BadSetting
from engine.frozen_weights import hosts, plain_weight
from engine.roles import output_head
from engine.shared_weights import correct_alike, corrects
from engine.stored_names import StoredNames

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_MOST_NAMED = 3
_QUANTISED = {"Params4bit": "4-bit NF4", "Int8Params": "8-bit"}  # bitsandbytes' classes of weights


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model.

    Attributes:
        host: The module that holds it, below any adapter.
        corrections: The adapter layers around the host that change the tensor.
        attribute: The tensor's name in the host.
        dtype: The type that it is written as.
    """

    host: nn.Module
    corrections: tuple[LoraLayer, ...]
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
        groups: The tensors' names. Tensors that the files hold in other pieces than the model are in one group.
        untied: Whether tied tensors are written separately, because the adapter changes only one of them.
        notes: What a user should know about how they are computed.
    """

    def __init__(self, base: Base, adapter: str) -> None:
        self.adapter = adapter
        self.model: Any = base.model.get_base_model()
        self._stored = stored_dtypes(base.path)
        self.dtype = self._written_dtype(base.path)
        self.untied = False
        self.stored_names = StoredNames(self.model)
        found = dict(self._find())
        self.groups = self.stored_names.groups(found)
        self.tensors = dict(item for group in self.groups for item in self._as_stored(found, group).items())
        self.adapted_layers = sum(bool(tensor.corrections) for tensor in self.tensors.values())
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
            if tensor.attribute == "weight":
                value = plain_weight(tensor.host)
            else:
                value = getattr(tensor.host, tensor.attribute).detach()
            for layer in tensor.corrections:
                value = corrected(layer, self.adapter, value.to(torch.float32))
            value = value.to("cpu", dtype, copy=True).contiguous()
        if dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise BadSetting(f"{name} is not finite once merged and written as {_name(dtype)}")
        return value

    def _find(self) -> Iterator[tuple[str, MergedTensor]]:
        seen: dict[int, list[tuple[str, MergedTensor]]] = {}
        for path, host, layers in hosts(self.model):
            for attribute, value in _own_tensors(host):
                name = f"{path}.{attribute}" if path else attribute
                correcting = tuple(
                    layer for layer in layers if self.adapter in layer.scaling and attribute == corrects(layer)
                )
                shape = _logical_shape(host, attribute, value)
                tensor = MergedTensor(host, correcting, attribute, shape, self._dtype_of(value))
                seen.setdefault(id(value), []).append((name, tensor))
        for sharing in seen.values():
            yield from self._saved(sharing)

    def _saved(self, sharing: list[tuple[str, MergedTensor]]) -> list[tuple[str, MergedTensor]]:
        """Return which of the tensors that share memory are saved: one, unless the adapter changes some alone.

        Raises:
            BadSetting: It changes them differently, and the model's class has one place for all of them.
        """
        if len(sharing) == 1:
            return sharing
        if not correct_alike([tensor.corrections for _, tensor in sharing], self.adapter):
            ends = [_bare(end) for end in (self.model.get_input_embeddings(), output_head(self.model))]
            if any(all(tensor.host is not end for end in ends) for _, tensor in sharing):
                names = ", ".join(name for name, _ in sharing[:_MOST_NAMED])
                raise BadSetting(
                    f"the model holds one weight as {names}, and the adapter corrects it differently there: a merged "
                    "model has no place for several; the adapter itself is whole"
                )
            self.untied = True
            return sharing
        derived = getattr(self.model, "all_tied_weights_keys", {})
        return [next((item for item in sharing if item[0] not in derived), sharing[0])]

    def _dtype_of(self, value: torch.Tensor) -> torch.dtype:
        quantised = type(value).__name__ in _QUANTISED
        return self.dtype if quantised or value.is_floating_point() else value.dtype

    def _as_stored(self, found: Mapping[str, MergedTensor], group: list[str]) -> dict[str, MergedTensor]:
        """Return a group's tensors in the type that the files have them in, under whatever names."""
        tensors = {name: found[name] for name in group}
        files = self.stored_names.of({name: tensor.shape for name, tensor in tensors.items()})
        dtypes = {self._stored[name] for name in files if name in self._stored}
        if len(dtypes) != 1 or any(
            type(getattr(tensor.host, tensor.attribute)).__name__ in _QUANTISED for tensor in tensors.values()
        ):
            return tensors
        dtype = dtypes.pop()
        return {
            name: replace(tensor, dtype=dtype) if tensor.dtype.is_floating_point else tensor
            for name, tensor in tensors.items()
        }

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


def corrected(layer: LoraLayer, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight with an adapter merged into it as PEFT does, in fp32.

    Args:
        layer: The adapter layer.
        adapter: The adapter's name on the layer.
        weight: The weight without the adapter, in fp32.
    """
    if isinstance(layer, ParamWrapper):
        return weight + _stacked_delta(layer, adapter).to(weight.device)
    variant = layer.lora_variant.get(adapter)
    if variant is None:
        return weight + layer.get_delta_weight(adapter).to(torch.float32)
    merged: torch.Tensor = variant.merge_safe(layer, adapter, weight)
    layer._caches.pop(f"{adapter}-weight_norm", None)  # kept by PEFT for undoing a merge that is not done here
    return merged


def _stacked_delta(layer: ParamWrapper, adapter: str) -> torch.Tensor:
    """Return the correction of a parameter that PEFT adapts by its name, of stacked experts for example, in fp32.

    Returns:
        In the parameter's shape: (out, in); or (experts, out, in), and (experts, in, out) where the layer holds it so.

    Source: PEFT 0.21, `ParamWrapper.get_delta_weight`, which rounds it to the parameter's type.
    """
    a, b = layer.lora_A[adapter].weight.to(torch.float32), layer.lora_B[adapter].weight.to(torch.float32)
    if layer.num_experts == 1:
        return layer.scaling[adapter] * (b @ a)
    a = a.reshape(layer.num_experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, layer.num_experts)
    order = "ore,eri->eoi" if layer._did_swap_in_out_features else "ore,eri->eio"
    return layer.scaling[adapter] * torch.einsum(order, b, a)


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


def _bare(module: Any) -> Any:
    """Return a module without the adapters around it."""
    while isinstance(module, LoraLayer):
        module = module.base_layer
    return module


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
