"""Adapters of a given rank on all linear layers of a local model, with random weights: made, not trained."""

from pathlib import Path
from typing import Any


def make_random_adapter(
    model_folder: Path, folder: Path, model_id: str, rank: int, seed: int, *, size: float = 0.02, **settings: Any
) -> int:
    """Write an adapter as PEFT writes it; B is not zero, so that it changes what the base says.

    Args:
        size: The standard deviation of its weights.
        settings: More in the terms of LoraConfig.

    Returns:
        The bytes of its weights.
    """
    import torch
    from peft import LoraConfig, PeftModelForCausalLM
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    plain = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=model_id, **plain | settings)
    with torch.device("meta"):  # the base's shapes are wanted, not its weights
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
        model = PeftModelForCausalLM(base, config)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    state = {name: torch.randn(shape, generator=generator) * size for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors")
    return (folder / "adapter_model.safetensors").stat().st_size
