"""The adapter's folder is read again as PEFT reads it, and compared with what was trained, before it is handed out."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights

from engine import methods
from engine.base import Base
from engine.checkpoints import Tensors
from engine.decompositions import freezes_others
from engine.errors import ExportDiffers
from engine.export_check import distance
from engine.stored_names import names_for_peft

_PREFIX = "base_model.model."
# Of a product that was written as the difference of two: measured below 1e-6.
_CONVERSION = 1e-4
# Of the answers, by the type that the base computes in; the adapter itself is the same to the bit.
_ANSWERS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PROBE_TOKENS = 32


def check_folder(folder: Path, base: Base, adapter: str, initial: Tensors) -> None:
    """Compare an adapter's files with the adapter on the base.

    Args:
        folder: Has the files.
        base: With the adapter that they were written from.
        adapter: Its name there.
        initial: A and B as initialised where they were converted; the files then hold the difference.

    Raises:
        ExportDiffers: A tensor or a scaling is not what was trained; the message names the first.
    """
    config = PeftConfig.from_pretrained(str(folder))
    trained = methods.adapter_state(base.model, adapter)
    held = {stored: name for name, stored in names_for_peft(base.model.get_base_model(), trained).items()}
    read = load_peft_weights(str(folder), device="cpu")
    found = {held.get(name, name): tensor for name, tensor in read.items()}
    if lost := [name for name in trained if name not in found]:
        raise ExportDiffers(f"the adapter's file has no tensor {lost[0]}, which was trained")
    if over := sorted(found.keys() - trained.keys()):
        raise ExportDiffers(f"the adapter's file has a tensor {over[0]}, which was not trained")
    for path, layer in base.model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
            continue
        scaling, own = scaling_of(config, path, layer), layer.scaling[adapter]
        if not initial and not math.isclose(scaling, own, rel_tol=1e-6):
            raise ExportDiffers(f"the adapter's config scales {path} by {scaling:g}, and it was trained with {own:g}")
        if initial:
            _compare_products(path, found, trained, initial, scaling, own)
    for name, tensor in trained.items():
        converted = initial and (".lora_A." in name or ".lora_B." in name)
        if not converted and not torch.equal(found[name], tensor):
            raise ExportDiffers(f"the first tensor of the adapter's file that differs from what was trained is {name}")


def scaling_of(config: PeftConfig, path: str, layer: Any) -> float:
    """Return what PEFT scales a layer by when it reads this config.

    Source: PEFT 0.21, `LoraModel._create_and_replace` and `LoraLayer.update_layer`.
    """
    if not isinstance(config, LoraConfig):
        raise ExportDiffers(f"the adapter's config is of the kind {config.peft_type}, and LoRA was trained")
    key = path
    if isinstance(layer, ParamWrapper):
        key = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _compare_products(
    path: str, found: Tensors, trained: Tensors, initial: Tensors, scaling: float, held: float
) -> None:
    """Compare what a converted layer does to a vector with what it was trained to: s'B'A'x with s(BAx - B₀A₀x)."""
    a, b = (f"{_PREFIX}{path}.lora_{part}.weight" for part in "AB")
    if a not in found:
        return  # a layer without an adapter of this kind
    probe = torch.randn(trained[a].shape[1], generator=torch.Generator().manual_seed(0))
    was, began = (pair[b].float() @ (pair[a].float() @ probe) for pair in (trained, initial))
    wanted, given = held * (was - began), scaling * (found[b].float() @ (found[a].float() @ probe))
    size = abs(held) * float(was.norm() + began.norm())
    if not float((wanted - given).norm()) <= _CONVERSION * size:
        raise ExportDiffers(f"{path} as it is handed out does not do what was trained")


class TrainedAnswers:
    """What the trained adapter answers, to be compared with what its files answer on the base.

    Args:
        base: With the adapter as it was trained.
        adapter: Its name there.

    Attributes:
        wanted: The logits after each token of a probe; None where they are not comparable. A residual that was rounded
            to 4 bits is not the base that the files are for, and Unsloth's own passes return no logits.
    """

    def __init__(self, base: Base, adapter: str, config: Any) -> None:
        self._adapter = adapter
        rounded = config.quantization != "none" and freezes_others(config)
        self.wanted = None if rounded or base.engine != "transformers" else self._answers(base)

    def _answers(self, base: Base) -> torch.Tensor:
        drawn = torch.randint(base.embeddings, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        base.model.eval()
        with base.using(self._adapter), torch.inference_mode():
            logits = base.model(input_ids=drawn.to(base.device), use_cache=False).logits[0].float().cpu()
        return logits - logits.mean(dim=-1, keepdim=True)

    def compare(self, base: Base) -> None:
        """Compare with what is on the base under the same name now.

        Raises:
            ExportDiffers: It answers otherwise.
        """
        if self.wanted is None:
            return
        far = distance([self._answers(base)], [self.wanted])
        tolerance = _ANSWERS.get(base.model.get_base_model().dtype, 1e-1)
        if far is not None and not far <= tolerance:
            raise ExportDiffers(
                f"the adapter's files answer {far:.3g} of the logits' size away from the adapter as it was trained"
            )
