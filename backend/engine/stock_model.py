"""Base and adapter as stock transformers and stock PEFT have them, and the tensors that a merge of them must have.

Nothing here loads as the engine does: this is what an export is compared with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.errors import BadModel
from engine.model_class import attention_of, longest_of, model_class
from engine.stored_names import StoredNames

_ADAPTER = "default"  # PEFT's name for the one adapter


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor as it must be in a merged model.

    Attributes:
        value: In fp32 where the adapter corrects it; as the base holds it otherwise.
        corrected: Whether the adapter changes it.
        scale: The largest number that its sum was computed from: the sum is off by a rounding of it.
    """

    value: torch.Tensor
    corrected: bool
    scale: float


@contextmanager
def _load_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise BadModel(f"stock transformers cannot load {what}: {type(error).__name__}: {error}") from error


def load_stock(
    folder: Path, dtype: torch.dtype | str, quantization: str = "none", **options: Any
) -> tuple[Any, set[str]]:
    """Load a model with stock transformers onto the CPU.

    Args:
        folder: The model's.
        dtype: Of its weights; "auto" for the type of the files.
        quantization: How the base was held while the adapter was trained. Such weights are rounded as they were then,
            and held as ordinary ones.
        options: More for `from_pretrained`.

    Returns:
        The model, and the names of the tensors that the files lack.

    Raises:
        BadModel: It cannot be loaded.
    """
    config, loader = None, AutoModelForCausalLM
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    with _load_errors(folder.name):
        if "gguf_file" not in options:
            published = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            # Named, so that a config cannot make transformers fetch a kernel.
            options["attn_implementation"] = attention_of(model_class(published)[0])
            if type(published) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                loader = AutoModelForImageTextToText
        model, about = loader.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=config,
            device_map={"": "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        if config is not None:
            model = model.dequantize()
    return model.requires_grad_(False).eval(), {*about["missing_keys"], *about["mismatched_keys"]}


def answers(model: Any, prompts: list[list[int]], check_stop: Callable[[], None]) -> list[torch.Tensor]:
    """Return the logits after each token of each prompt, (tokens, vocabulary) in fp32, less their mean.

    Only differences of logits mean anything: the mean says nothing.
    """
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            check_stop()
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float()
            found.append(logits - logits.mean(dim=-1, keepdim=True))
    return found


class StockModel:
    """A base with an adapter. Its tensors can be taken once each: memory holds one of them in fp32 at a time.

    Args:
        base: The base's folder.
        adapter: The adapter's folder.
        dtype: That the base is held in.
        quantization: How its linear weights are rounded before.

    Attributes:
        lacking: The names of the tensors that the base's own files lack.

    Raises:
        BadModel: It cannot be loaded.
    """

    def __init__(self, base: Path, adapter: Path, dtype: torch.dtype | str, quantization: str) -> None:
        self._bare, self.lacking = load_stock(base, dtype, quantization)
        self.names = StoredNames(self._bare)
        state = self._bare.state_dict()
        self._tied: dict[str, int] = {name: value.data_ptr() for name, value in state.items()}
        self.tensors = {name: tuple(value.shape) for name, value in state.items()}
        with _load_errors(adapter.name):
            self.model: Any = PeftModel.from_pretrained(self._bare, str(adapter), adapter_name=_ADAPTER).eval()

    @property
    def embeddings(self) -> int:
        """How many tokens the model has embeddings for."""
        return int(self._bare.get_input_embeddings().weight.shape[0])

    @property
    def longest(self) -> int | None:
        """How many tokens it takes at a time, if its config says so."""
        return longest_of(self._bare.config)

    def twins(self, name: str) -> list[str]:
        """Return the other names of a tensor."""
        place = self._tied[name]
        return [other for other, its in self._tied.items() if its == place != 0 and other != name]

    def expected(self, name: str) -> ExpectedTensor:
        """Return a tensor as PEFT's own merge makes it, in fp32, and forget it where the adapter corrects it.

        Args:
            name: Of the model without adapters.
        """
        path, _, attribute = name.rpartition(".")
        host, layers = self._find(path)
        correcting = [layer for layer in layers if _corrects(layer) == attribute and _ADAPTER in layer.scaling]
        own = getattr(host, attribute).detach()
        if not correcting:
            return ExpectedTensor(own, corrected=False, scale=0.0)
        # Of its own: a tensor that is tied to it stays as it is.
        setattr(host, attribute, nn.Parameter(own.to(torch.float32, copy=True), requires_grad=False))
        scale = float(own.abs().max()) + sum(_scale(layer) for layer in correcting)
        with torch.no_grad():
            for layer in correcting:
                layer.merge(safe_merge=True, adapter_names=[_ADAPTER])
        merged = getattr(host, attribute).detach()
        setattr(host, attribute, nn.Parameter(torch.empty(0), requires_grad=False))
        return ExpectedTensor(merged, corrected=True, scale=scale)

    def _find(self, path: str) -> tuple[Any, list[Any]]:
        """Return a module without adapters around it, and the adapters' layers that are."""
        module: Any = self._bare
        layers: list[Any] = []
        for part in path.split(".") if path else ():
            module, layers = getattr(module, part), []
            while isinstance(module, LoraLayer):
                layers.append(module)
                module = module.base_layer
        return module, layers


def _corrects(layer: LoraLayer) -> str:
    return layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"


def _scale(layer: Any) -> float:
    """Return what no product of a row of B and a column of A exceeds, scaled."""
    parts = layer.lora_A or layer.lora_embedding_A, layer.lora_B or layer.lora_embedding_B
    a, b = (getattr(part[_ADAPTER], "weight", part[_ADAPTER]) for part in parts)
    return abs(layer.scaling[_ADAPTER]) * float(a.norm(dim=0).max()) * float(b.norm(dim=1).max())
