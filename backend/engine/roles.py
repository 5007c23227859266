"""What each linear module of a model does, as far as its place among the others tells.

The rules look at what is built, never at the family's name: which module holds stacked experts, which part is the text
decoder, which class computes a plain product.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from domain.models.shape import Role, Stacked

# Parts of a class' or a module's name that tell what it is.
_ATTENTION = ("attn", "attention")
_FEED_FORWARD = ("mlp", "ffn", "feedforward", "feed_forward", "fc", "expert", "dense")
_WORDS: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        "state_space": ("mamba", "ssm", "linear_attn", "conv", "recurrent", "rwkv", "delta", "lightning"),
        "attention": _ATTENTION,
        "mlp": _FEED_FORWARD,
    }
)


def linear_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and module of every linear module but the output head; bitsandbytes' classes are nn.Linear's."""
    head = output_head(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield path, module


def output_head(model: Any) -> nn.Module | None:
    """Return the module that makes logits; None where the class does not say."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def features(module: Any) -> tuple[int, int]:
    """Return a linear module's input and output features."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)


def stacked_experts(module: nn.Module) -> Iterator[tuple[str, Stacked]]:
    """Yield the stacked experts in a module: the path of the module that holds them, and each tensor."""
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.dim() == 3 and hasattr(child, "num_experts") and parameter.shape[0] == child.num_experts:
                experts, first, second = parameter.shape
                turned = bool(getattr(child, "is_transposed", False))
                fan_in, fan_out = (first, second) if turned else (second, first)
                yield path, Stacked(f"{path}.{name}".lstrip("."), experts, fan_in, fan_out)


def roles(model: Any) -> dict[str, Role]:
    """Say what each linear module does. What no gradient reaches is not seen here; `engine.outline` finds it.

    Returns:
        Path → role, for every module of `linear_modules`.
    """
    text, choosers = text_path(model), dict(_choosers(model))
    lists = _expert_lists(model)
    refused, modules = LoraConfig(), dict(model.named_modules())
    found: dict[str, Role] = {}
    for path, module in linear_modules(model):
        if not _is_plain(module):
            found[path] = "special"
        elif not path.startswith(text):
            found[path] = "tower"
        elif _chooses(path, module, choosers):
            found[path] = "router"
        elif _is_refused(refused, model, path):
            found[path] = "refused"
        elif any(path.startswith(prefix) for prefix in lists):
            found[path] = "expert"
        else:
            found[path] = _by_place(path, modules)
    return found


def text_path(model: Any) -> str:
    """Return the path of the part through which text passes, with a dot; empty where that is the whole model."""
    if getattr(model.config, "get_text_config", lambda **_: model.config)(decoder=True) is model.config:
        return ""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for path, module in model.named_modules():
        if module is decoder and path:
            return f"{path}."
    return ""


def _choosers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the paths of the modules that hold experts directly, each with how many experts it has."""
    for path, stacked in stacked_experts(model):
        yield f"{path.rpartition('.')[0]}.", stacked.experts
    for prefix, count in _expert_lists(model).items():
        yield f"{prefix.rstrip('.').rpartition('.')[0]}.", count


def _expert_lists(model: nn.Module) -> dict[str, int]:
    """Find experts that are modules of a list: the list's path, with a dot, and how many there are."""
    return {
        f"{path}.": len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts"
    }


def _chooses(path: str, module: Any, choosers: dict[str, int]) -> bool:
    """Tell whether a module chooses among the experts beside it, or weighs what a shared one says."""
    _, outputs = features(module)
    for prefix, experts in choosers.items():
        if path.startswith(prefix) and ".experts." not in path[len(prefix) - 1 :]:
            inner = path.removeprefix(prefix)
            if any(word in inner for word in _ATTENTION):
                continue
            if outputs == 1 or (outputs == experts and "shared" not in inner and inner.count(".") <= 1):
                return True
    return False


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module computes the product with its weight and nothing else.

    Falcon's own class does, by another name; bitsandbytes' classes do, in fewer bits.
    """
    kind = type(module)
    if isinstance(module, Conv1D) or kind.forward is nn.Linear.forward:
        return True
    return kind.__name__ == "FalconLinear" or kind.__module__.startswith(("bitsandbytes.", "torch."))


def _is_refused(config: LoraConfig, model: Any, path: str) -> bool:
    """Tell whether PEFT puts no adapter there.

    It refuses modules whose weight fused state-space kernels read past the module. And it takes the names that experts
    had in transformers 4 for the stacked experts of today, wherever in the model they stand, so that a shared expert
    cannot be named apart from them (PEFT 0.21, utils/transformers_weight_conversion.py).
    """
    name, kind = path.rpartition(".")[2], model.config.model_type
    try:
        _check_lora_target_modules_mamba(config, model, name)
    except ValueError:
        return True
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(kind)
    return name in _MOE_TARGET_MODULE_MAPPING.get(pattern, {}) and get_checkpoint_conversion_mapping(kind) is not None


def _by_place(path: str, modules: dict[str, nn.Module]) -> Role:
    """Name a role by what the module is a part of: the classes of the modules around it tell, then their names."""
    if "shared" in path and any(word in path for word in _FEED_FORWARD):
        return "shared_expert"
    around = [path[:at] for at, sign in enumerate(path) if sign == "."][::-1]
    names = [*(type(modules[outer]).__name__.lower() for outer in around), *path.split(".")[::-1]]
    for name in names[: len(around) - 1] + names[len(around) :]:  # the outermost class is the whole model's
        for role, words in _WORDS.items():
            if any(word in name for word in words):
                return role
    return "other"
