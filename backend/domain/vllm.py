"""How vLLM serves an adapter as it is: the command, or why there is none.

Source: vLLM's docs/features/lora.md (the arguments), vllm/config/lora.py (the ranks), vllm/lora/peft_helper.py (what it
reads of adapter_config.json) and vllm/lora/lora_model.py (which tensors it takes).
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
_PEFT_RANK = 8  # where a config names none
# Settings that vLLM refuses, or passes over so that the answers would be others.
_NOT_THERE = {
    "use_dora": "it is a DoRA adapter, which vLLM cannot load",
    "modules_to_save": "it has whole modules beside LoRA (modules_to_save), which vLLM refuses",
    "rank_pattern": "its layers have different ranks (rank_pattern), and vLLM scales all of them by one",
    "alpha_pattern": "its layers have different alphas (alpha_pattern), and vLLM scales all of them by one",
    "target_parameters": "it adapts stacked experts (target_parameters), whose weights vLLM reads in another form",
    "trainable_token_indices": "it has trained tokens (trainable_token_indices), which vLLM does not read",
    "lora_bias": "its A and B have biases (lora_bias), which vLLM does not read",
}
_INSTEAD = "; export it as a merged model, and serve that"


@dataclass(frozen=True)
class VllmServing:
    """One of the two is None."""

    command: str | None
    why_not: str | None


@dataclass(frozen=True)
class VllmBase:
    """The base, as vLLM finds it.

    Attributes:
        model: The Hub's id, or a folder.
        revision: Of a Hub's model.
    """

    model: str
    revision: str | None


def serve_with_vllm(
    base: VllmBase, name: str, folder: str, config: Mapping[str, Any] | None, template: str | None
) -> VllmServing:
    """Return how vLLM serves an adapter.

    Args:
        name: What requests name it by.
        folder: The adapter's, as PEFT loads it.
        config: Its adapter_config.json; None where it cannot be read.
        template: The file of its chat template, if it has one: it is rendered as it was trained.
    """
    if config is None:
        return VllmServing(None, "its adapter_config.json cannot be read")
    rank = config.get("r", _PEFT_RANK)
    reasons = [why for setting, why in _NOT_THERE.items() if config.get(setting)]
    if config.get("bias", "none") != "none":
        reasons.append("it has biases of its own (bias), which vLLM does not read")
    fitting = next((most for most in _RANKS if most >= rank), None)
    if fitting is None:
        reasons.append(f"its rank is {rank}, and vLLM takes {_RANKS[-1]} at most")
    if reasons:
        return VllmServing(None, "; ".join(reasons) + _INSTEAD)
    # The short form of vLLM is split at these.
    plain = not {"=", ","} & set(name + folder)
    module = f"{name}={folder}" if plain else json.dumps({"name": name, "path": folder})
    words = ["vllm", "serve", base.model]
    words += ["--revision", base.revision] if base.revision is not None else []
    words += ["--enable-lora", "--lora-modules", module, "--max-lora-rank", str(fitting)]
    words += ["--chat-template", template] if template is not None else []
    return VllmServing(shlex.join(words), None)
