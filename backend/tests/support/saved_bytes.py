"""Measures what autograd holds between a forward and a backward pass."""

import weakref
from collections.abc import Callable
from typing import Any

import torch


class _Held:
    """What a saved tensor is packed into; it lives as long as the graph needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes of the storages that the graph of `forward` holds, parameters and buffers left out."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    packed: list[weakref.ref[_Held]] = []

    def pack(tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        packed.append(weakref.ref(held))
        return held

    def unpack(held: Any) -> torch.Tensor:
        tensor: torch.Tensor = held.tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = forward()
    storages = {}
    for reference in packed:
        held = reference()
        if held is not None and held.tensor.untyped_storage().data_ptr() not in owned:
            storage = held.tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    del output
    return sum(storages.values())
