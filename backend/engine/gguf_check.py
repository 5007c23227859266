"""A GGUF file's tensors, read by the `gguf` package, beside those that base and adapter make."""

from pathlib import Path

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, dequantize, get_tensor_name_map

from domain.models.gguf import GgufModel
from engine.errors import ExportDiffers
from engine.gguf_export import permuted
from engine.stock_model import ExpectedTensor
from engine.tensor_difference import difference

_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.Q8_0: torch.float32,
}
_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}
_COMPUTED = "rope_freqs.weight"  # of the config alone


class WrittenGguf:
    """The tensors of a GGUF file.

    Args:
        file: The file.
        model: What it is.

    Raises:
        ExportDiffers: It cannot be read.
    """

    def __init__(self, file: Path, model: GgufModel) -> None:
        try:
            self._tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise ExportDiffers(f"the file cannot be read: {type(error).__name__}: {error}") from error
        self._model = model
        architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == model.architecture)
        self._map = get_tensor_name_map(MODEL_ARCH(architecture), model.layers)
        self.names = set(self._tensors) - {_COMPUTED}
        # The coarsest type decides how far the answers may be off.
        kinds = {_KINDS[tensor.tensor_type.name] for tensor in self._tensors.values()}
        self.kind: str = next(kind for kind in ("q8_0", "bfloat16", "float16", "float32") if kind in kinds)

    def placed(self, group: dict[str, ExpectedTensor]) -> dict[str, ExpectedTensor]:
        """Return what must be in the file for a group of the model's tensors: each is one of the file's."""
        return {self._name(name): self._turned(name, tensor) for name, tensor in group.items()}

    def differs(self, name: str, expected: ExpectedTensor) -> str:
        """Say how a tensor differs; nothing where it does not."""
        tensor = self._tensors[name]
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found = numbers.reshape(shape).to(_TYPES[tensor.tensor_type])
        return difference(found, expected, blocks=tensor.tensor_type == GGMLQuantizationType.Q8_0)

    def _name(self, name: str) -> str:
        return self._map.get_name(name, try_suffixes=(".weight", ".bias")) or name

    def _turned(self, name: str, tensor: ExpectedTensor) -> ExpectedTensor:
        if not self._model.permuted or not (".q_proj." in name or ".k_proj." in name):
            return tensor
        heads = self._model.heads if ".q_proj." in name else self._model.kv_heads
        return ExpectedTensor(permuted(tensor.value, heads), tensor.corrected, tensor.scale)
