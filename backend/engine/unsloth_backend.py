"""The fast path on a CUDA GPU: Unsloth loads the base with its layers and kernels.

Plain PEFT adds the adapters. So every method, several adapters on one base, and exact adapter files work the same on
both back ends. Unsloth's kernels are put onto the adapter for the time of its training and taken off afterwards. A
comment names each thing that Unsloth would otherwise do silently.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from domain.peft.config import PeftConfig
from domain.peft.unsloth_rules import not_fused
from engine.batches import Batch
from engine.errors import BadModel, BadSetting
from engine.loss import BatchLoss
from engine.transformers_backend import DTYPES, load_tokenizer

# Where Unsloth's `patch_peft_model` puts its fused products.
_FUSED = {"mlp": ("forward", "_unsloth_forward"), "self_attn": ("apply_qkv", "apply_o")}


def load_arguments(path: Path, config: PeftConfig, device: str) -> dict[str, Any]:
    """Return the arguments of `unsloth.FastLanguageModel.from_pretrained`. None is left to its default."""
    four_bit = config.quantization == "nf4"
    return {
        "model_name": str(path),
        "max_seq_length": config.max_seq_length,
        "dtype": DTYPES[config.precision],
        "load_in_4bit": four_bit,
        "load_in_8bit": False,
        "load_in_16bit": not four_bit,
        "full_finetuning": False,
        "device_map": {"": device},  # by default it spreads the model over every GPU it sees
        "rope_scaling": None,
        "fix_tokenizer": False,  # it would be another tokenizer than the adapter is handed out with
        "trust_remote_code": False,
        "use_gradient_checkpointing": False,  # each run says for itself
        "resize_model_vocab": None,
        "use_exact_model_name": True,  # a folder's name is not to be looked up in its table of repositories
        "offload_embedding": False,  # by default it moves them to the host where memory is tight
        "fast_inference": False,  # that is vLLM, which takes most of the GPU's memory for itself
        "random_state": config.seed,
        "local_files_only": True,
        "use_safetensors": True,
    }


def packed_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the lengths of the rows packed into (B, T), in order; position ids restart at every row."""
    flat = position_ids.flatten()
    starts = torch.nonzero(flat == 0).flatten()
    ends = torch.cat([starts[1:], torch.tensor([len(flat)], device=flat.device)])
    return (ends - starts).to(torch.int32)


def forward_arguments(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the arguments of Unsloth's forward pass for a batch. It then sums the loss over the trained tokens.

    With labels Unsloth computes the loss in chunks and never holds all logits. It divides the sum by
    `num_items_in_batch`. Packed rows are put in one sequence with their lengths, since Unsloth does not read from
    position ids where a row ends. It would let each row attend to those before it.
    """
    ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    arguments: dict[str, Any] = {"use_cache": False, "num_items_in_batch": 1}
    if batch.position_ids is None:
        mask = batch.attention_mask.to(device) if batch.attention_mask is not None else None
        return arguments | {"input_ids": ids, "labels": labels, "attention_mask": mask}
    positions = batch.position_ids.to(device)
    return arguments | {
        "input_ids": ids.reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "position_ids": positions.reshape(1, -1),
        "packed_seq_lengths": packed_lengths(positions),
    }


class FusedLoss:
    """Unsloth's fused cross-entropy, summed over a batch's trained tokens."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device

    def __call__(self, batch: Batch) -> BatchLoss:
        """Return the sum. No logits are there to tell which tokens are the likeliest."""
        return BatchLoss(self._model(**forward_arguments(batch, self._device)).loss, hits=None)


class UnslothBackend:
    """Trains with Unsloth's kernels and checkpointing, answers with its inference path. Needs a CUDA GPU."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def load(self, path: Path, config: PeftConfig, device: str) -> tuple[Any, Any]:
        """Return the model and its tokenizer, from a folder.

        Raises:
            BadModel: Unsloth would stretch its positions, or has changed its vocabulary.
        """
        os.environ.setdefault("UNSLOTH_SKIP_TORCHVISION_CHECK", "1")
        from transformers import AutoConfig
        from unsloth import FastLanguageModel

        written = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if config.max_seq_length > written.max_position_embeddings:
            raise BadModel(f"the model knows {written.max_position_embeddings} tokens; Unsloth would stretch them")
        model, _ = FastLanguageModel.from_pretrained(**load_arguments(path, config, device))
        rows = model.get_input_embeddings().weight.shape[0]
        if rows != written.vocab_size:
            raise BadModel(f"Unsloth changed the vocabulary from {written.vocab_size} entries to {rows}")
        return model, load_tokenizer(path)

    def begin_training(self, model: Any, config: PeftConfig) -> str:
        """Put Unsloth's kernels and checkpointing into the model; return how many layers they fit, in words."""
        from unsloth import FastLanguageModel
        from unsloth.models._utils import apply_unsloth_gradient_checkpointing

        wanted = "unsloth" if config.gradient_checkpointing else False
        dtype = model.get_input_embeddings().weight.dtype
        checkpointing = apply_unsloth_gradient_checkpointing(wanted, model.max_seq_length, dtype)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._before = [
            (module, name, module.__dict__.get(name)) for module, names in _fusable(model) for name in names
        ]
        FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing=checkpointing)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)  # it turns on every adapter of the base
        FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
        return self._described(model, config, checkpointing)

    def _described(self, model: Any, config: PeftConfig, checkpointing: Any) -> str:
        fused = sum(module.__dict__.get(name) is not before for module, name, before in self._before)
        layers = len(_layers(model))
        recomputed = {"unsloth": "Unsloth's", True: "plain", False: "no"}[checkpointing]
        why = not_fused(config)
        if why is not None or fused == 0:
            because = why or "it fits none of the layers' biases, types and targets"
            return f"PEFT's own layers on a base that Unsloth loaded: {because}; {recomputed} checkpointing"
        return (
            f"Unsloth's fused kernels: {fused} of {3 * layers} (MLP, QKV and O of {layers} layers); "
            f"{recomputed} checkpointing"
        )

    def end_training(self, model: Any, config: PeftConfig) -> None:
        """Take the kernels out again."""
        from unsloth import FastLanguageModel

        # Left in place, they would read adapters from layers that have none once the last one is taken off.
        for module, name, before in self._before:
            if before is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
        self._before = []
        FastLanguageModel.for_inference(model)

    def begin_answering(self, model: Any) -> None:
        """Switch to Unsloth's inference path."""
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)

    def loss(self, model: Any, device: torch.device) -> Callable[[Batch], BatchLoss]:
        """Return a function from a batch to the sum of the fused loss."""
        return FusedLoss(model, device)

    def loss_described(self) -> str:
        """Name Unsloth's loss."""
        return "by Unsloth's fused cross-entropy"

    def token_losses(self, model: Any, device: torch.device) -> Callable[[Batch], torch.Tensor]:
        """Refuse it.

        Raises:
            BadSetting: Unsloth's fused loss has the sum alone.
        """
        raise BadSetting("objective: Unsloth's fused loss does not give the loss of each token")

    def longest(self, model: Any) -> int | None:
        """Return the tokens that the model was loaded for."""
        return int(model.max_seq_length)


def _layers(model: Any) -> Any:
    return model.get_base_model().model.layers


def _fusable(model: Any) -> list[tuple[Any, tuple[str, ...]]]:
    return [(getattr(layer, part), names) for layer in _layers(model) for part, names in _FUSED.items()]
