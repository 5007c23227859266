"""Plain transformers + PEFT, which run everywhere, the CPU included."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from domain.peft.config import PeftConfig
from engine.batches import Batch
from engine.errors import BadModel
from engine.loss import BatchLoss, SummedLoss, TokenLosses
from engine.model_class import attention_of, longest_of, model_class
from engine.outline import kept_in_full

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantization_config(config: PeftConfig, in_full: list[str] | None = None) -> BitsAndBytesConfig | None:
    """Describe the storage of the base's linear weights in bitsandbytes' terms."""
    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[config.precision],
            llm_int8_skip_modules=in_full,
        )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=in_full)
    return None


def load_transformers(path: Path, config: PeftConfig, device: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder with plain transformers.

    The attention implementation is named here, so that a config cannot make transformers fetch a kernel, and
    remote code is never trusted.

    Raises:
        BadModel: No class of transformers predicts the next token with it, or the files lack some of its weights.
    """
    chosen, published = model_class(AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True))
    quantization = None
    if config.quantization != "none":
        quantization = quantization_config(config, kept_in_full(chosen, published))
    model, about = chosen.from_pretrained(
        path,
        config=published,
        dtype=DTYPES[config.precision],
        quantization_config=quantization,
        device_map={"": device},
        attn_implementation=attention_of(chosen),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    _refuse_lost_weights(chosen, about["missing_keys"])
    _keep_gradients_through_4bit(model)
    return model, load_tokenizer(path)


def _refuse_lost_weights(chosen: Any, names: Collection[str]) -> None:
    """Refuse a model whose files lack weights: transformers starts those from random numbers, others at each load."""
    if names:
        some = ", ".join(sorted(names)[:3])
        raise BadModel(f"the files lack {len(names)} tensors of {chosen.__name__}, {some} among them")


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer from a folder; remote code is never trusted."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def _keep_gradients_through_4bit(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for its inference kernel on CPUs with avx512_bf16.

    Linear4bit repacks them on the first forward pass in eval mode and never undoes it. The kernel has no backward pass.
    Training after any evaluation or generation would silently get wrong gradients. (With bitsandbytes 0.50.2 the
    gradient's norm fell to a fifth and the loss stayed where it was.)
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class TransformersBackend:
    """Trains and answers with the model as transformers made it."""

    def __init__(self) -> None:
        self._loss_how = ""

    def load(self, path: Path, config: PeftConfig, device: str) -> tuple[Any, Any]:
        """Return the model and its tokenizer, from a folder."""
        return load_transformers(path, config, device)

    def begin_training(self, model: Any, config: PeftConfig) -> str:
        """Turn on gradient checkpointing if the configuration has it."""
        if config.gradient_checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        layers = "PEFT's layers, with DoRA's norms in blocks of rows," if config.use_dora else "PEFT's own layers"
        return f"{layers} on a base that transformers loaded"

    def end_training(self, model: Any, config: PeftConfig) -> None:
        """Turn off gradient checkpointing."""
        if config.gradient_checkpointing:
            model.get_base_model().gradient_checkpointing_disable()

    def begin_answering(self, model: Any) -> None:
        """Set the model to evaluation."""
        model.eval()

    def loss(self, model: Any, device: torch.device) -> Callable[[Batch], BatchLoss]:
        """Return a function from a batch to the sum of the model's own loss."""
        loss = SummedLoss(model, device)
        self._loss_how = loss.how
        return loss

    def loss_described(self) -> str:
        """Say whether the loss that was made last goes by chunks, and if not why."""
        return self._loss_how

    def token_losses(self, model: Any, device: torch.device) -> Callable[[Batch], torch.Tensor]:
        """Return a function from a batch to the loss of each trained token."""
        losses = TokenLosses(model, device)
        self._loss_how = losses.how
        return losses

    def longest(self, model: Any) -> int | None:
        """Return the positions that the config names."""
        return longest_of(model.config)
