"""The weights under an adapter. They are kept while a method freezes others in their place, or read from the files."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from core.files import storage_errors
from domain.adapter_files import ORIGINALS
from engine.errors import BadSetting

# NF4 rounds normally distributed weights by 9 % of their norm, and a heavy tail by some more (measured); weights of
# another layer, or transposed ones, differ by 140 %.
_MOST_ROUNDING = 0.3


class PublishedWeights:
    """A model's weights as its files hold them, read one at a time. A base in 4 bits no longer has them.

    Args:
        folder: Holds the model's safetensors files.
        model: The model that transformers made from them, without adapters around it.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self._model, self._prefix = model, f"{model.base_model_prefix}."
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def read(self, path: str, layer: nn.Module) -> torch.Tensor:
        """Return a linear layer's weight in fp32 on the layer's device.

        Args:
            path: The layer's path in the model without adapters.
            layer: The layer as the base holds it, to compare with.

        Raises:
            BadSetting: The files do not hold the weight, or hold another one under its name.
        """
        stored = next((name for name in self._names(f"{path}.weight") if name in self._files), None)
        held = dequantize_module_weight(layer).detach().to(torch.float32)
        if stored is not None:
            with safe_open(self._files[stored], framework="pt") as tensors:
                weight = tensors.get_tensor(stored)
            if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):
                weight = weight.T  # transformers transposed it when it replaced the layer by a quantised linear one
            if weight.is_floating_point() and weight.shape == held.shape:
                weight = weight.to(held.device, torch.float32)
                if (weight - held).norm() <= _MOST_ROUNDING * held.norm():
                    return weight
        raise BadSetting(
            f"the model's files do not hold the full-precision weight of {path}, which this initialisation decomposes",
            ["algorithm qlora", "algorithm pissa with quantization none"],
        )

    def _names(self, name: str) -> Iterator[str]:
        """Yield the names that a tensor may have in the files: with or without the prefix, or renamed on load."""
        yield from (name, name.removeprefix(self._prefix), self._prefix + name)
        yield from revert_weight_conversion(self._model, {name: torch.empty(0)})


def plain_weight(module: Any) -> torch.Tensor:
    """Return a layer's weight as plain numbers, dequantised if need be. The layer stays as it is."""
    weight = module.weight
    if type(weight).__name__ == "Int8Params":
        # PEFT's dequantize_module_weight puts a new weight in place of an 8-bit one on the CPU, without its scales.
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        return dequantize_bnb_weight(weight, state=SimpleNamespace(SCB=scales)).detach()
    return dequantize_module_weight(module).detach()


def parts(weight: Any) -> dict[str, torch.Tensor]:
    """Return all tensors that make up a stored weight. They are not copies.

    Source: bitsandbytes' `QuantState`; its code books are constants.
    """
    state = getattr(weight, "quant_state", None)
    tensors = {"weight": weight.data}
    if state is not None:
        tensors["absmax"] = state.absmax
        if state.nested:
            tensors |= {"offset": state.offset, "nested_absmax": state.state2.absmax}
    return tensors


def freeze(layer: Any, weight: torch.Tensor) -> None:
    """Replace the numbers of a linear layer's weight. A weight that is stored in 4 bits stays stored in 4 bits.

    The layer's own tensors are written to, so that everything that refers to them sees the new numbers.

    Args:
        layer: A linear layer without adapters around it.
        weight: The new weight in fp32, in the layer's own orientation.
    """
    stored = layer.weight
    state = getattr(stored, "quant_state", None)
    if state is None:
        stored.data.copy_(weight)
        return
    from bitsandbytes import functional

    data, new = functional.quantize_4bit(
        weight.to(stored.device, state.dtype).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=stored.quant_storage,
    )
    stored.data.copy_(data.view(stored.data.shape))
    state.absmax.copy_(new.absmax)
    if state.nested:
        state.offset.copy_(new.offset)
        state.state2.absmax.copy_(new.state2.absmax)


@contextmanager
def original_weights_kept(model: nn.Module, paths: list[str], scratch: Path) -> Iterator[None]:
    """Keep the base's own weights during a run that freezes others, and put them back afterwards, to the bit.

    They cannot be computed back: adding a subtracted product rounds, and quantising a residual loses it. So the
    originals are kept on disk, 4-bit codes and their scales as they are. Each layer has a file, so that memory holds
    one layer at a time. They are copied back however the run ends.

    Args:
        model: With or without adapters.
        paths: The layers whose weights will change, as paths in the model without adapters.
        scratch: Folder for the files.

    Raises:
        StorageFull: They do not fit there; nothing has changed.
        SystemExit: They cannot be read again. The base is useless then, so the process must end.
    """
    if not paths:
        yield
        return
    with ExitStack() as stack:
        with storage_errors(scratch / ORIGINALS):
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix=ORIGINALS))
            files = {path: Path(folder) / f"{number}.safetensors" for number, path in enumerate(paths)}
            for path, file in files.items():
                own = parts(base_layer(model, path).weight)
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}, file)
        try:
            yield
        finally:
            _give_back(model, files)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _give_back(model: nn.Module, files: Mapping[str, Path]) -> None:
    try:
        for path, file in files.items():
            kept = load_file(file)
            for name, tensor in parts(base_layer(model, path).weight).items():
                tensor.copy_(kept[name])
    except Exception as error:
        raise SystemExit(f"the base's own weights cannot be put back: {error}") from error


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that adapters are on."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hosts(
    module: Any, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, list[LoraLayer]]]:
    """Yield a model's modules by their paths without adapters, each with the layers around it.

    PEFT nests the layers where it adapts several parameters of one module, and a module with adapters around it may
    have modules below it: a router's own correction, for example.
    """
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    layers = []
    while isinstance(module, LoraLayer):
        layers.append(module)
        module = module.base_layer
    yield path, module, layers
    for name, child in module.named_children():
        yield from hosts(child, f"{path}.{name}" if path else name, seen)


def base_layer(model: nn.Module, path: str) -> Any:
    """Return a linear layer, without the adapters around it."""
    layer = unwrapped(model).get_submodule(path)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def adapted_layer(model: nn.Module, path: str) -> LoraLayer:
    """Return the adapters around a linear layer.

    Raises:
        BadSetting: There are none.
    """
    layer = unwrapped(model).get_submodule(path)
    if not isinstance(layer, LoraLayer):
        raise BadSetting(f"{path} carries no adapter")
    return layer
