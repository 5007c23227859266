"""Whether a model's experts are adapted beside its other layers."""

from collections.abc import Collection
from dataclasses import dataclass

from domain.memory.estimate import estimate
from domain.memory.hardware_fit import fit_to_memory
from domain.memory.verdict import judge
from domain.models.shape import ModelShape
from domain.peft.config import DECOMPOSED, PeftConfig


@dataclass(frozen=True)
class Decision:
    """Whether experts are adapted, and why.

    Attributes:
        by_memory: Whether the device's memory decided.
    """

    adapted: bool
    reason: str
    by_memory: bool = False


def obstacle(shape: ModelShape | None, config: PeftConfig) -> str | None:
    """Return why experts cannot be adapted as configured; None if they can.

    What PEFT adapts by a parameter's name is W + B·A as a whole (PEFT 0.21, tuners/lora/layer.py, `ParamWrapper`): it
    refuses DoRA there, and a weight in few bits cannot be added to.

    Args:
        shape: The model; None where its layers are not known. Its experts are taken to be stacked then.
        config: The configuration.
    """
    if shape is not None and not shape.has_experts:
        return "the model has no experts"
    if shape is not None and not shape.has_stacked_experts:
        return None
    if config.use_dora:
        return "PEFT puts no DoRA on stacked experts"
    if config.init_weights in DECOMPOSED:
        return f"the initialisation {config.init_weights} decomposes linear layers, and no stacked experts"
    if shape is not None and shape.stored is not None:
        return f"the experts are published in {shape.stored.method}, and PEFT adds adapters to whole weights alone"
    return None


def decide(
    shape: ModelShape, config: PeftConfig, available_bytes: int | None, kept: Collection[str], *, on_gpu: bool
) -> Decision:
    """Decide for a client that leaves it open.

    "LoRA Without Regret" (Thinking Machines, 2025) finds that adapters on attention alone learn less, in models with
    experts too. So they are adapted wherever that is known to fit without a slower precision.

    Args:
        shape: The model.
        config: The configuration as it would be without them.
        available_bytes: What is free on the device; None where it does not say.
        kept: Parameters that must not change.
        on_gpu: Whether the device is a CUDA GPU.
    """
    why = obstacle(shape, config)
    if why is not None:
        return Decision(False, why)
    if config.target_modules != "all-linear":
        return Decision(False, "target_modules names what is adapted")
    if available_bytes is None:
        return Decision(False, "the device does not say what memory is free for the experts' adapters")
    with_experts = config.model_copy(update={"target_experts": True})
    changes = fit_to_memory(shape, with_experts, available_bytes, kept, on_gpu=on_gpu)
    needed = estimate(shape, with_experts.model_copy(update=dict(changes)), on_gpu=on_gpu)
    sizes = f"{needed.total_bytes / 2**30:.1f} GiB are estimated with them, {available_bytes / 2**30:.1f} GiB are free"
    if judge(needed, available_bytes) == "fits" and "precision" not in changes:
        said = f"adapters on experts learn more than on attention alone ('LoRA Without Regret'), and they fit: {sizes}"
        return Decision(True, said, by_memory=True)
    return Decision(False, f"adapters on the experts do not fit safely: {sizes}", by_memory=True)


def what_is_left_out(shape: ModelShape | None, config: PeftConfig) -> list[str]:
    """Say what of the other settings does not reach experts that are adapted."""
    if config.target_experts is not True or (shape is not None and not shape.has_stacked_experts):
        return []
    said = []
    if config.dropout > 0:
        said.append(
            f"dropout {config.dropout:g} is left out on stacked experts, where PEFT adds B·A to the weight itself"
        )
    if config.quantization != "none":
        said.append(
            f"stacked experts stay in {config.precision}, since {config.quantization} reaches linear layers alone"
        )
    return said
