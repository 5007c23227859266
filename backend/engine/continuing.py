"""The adapter that a run continues: its weights at the start, and a reference for preferences afterwards."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError

from domain.protocol import Train
from engine.adapter_check import scaling_of
from engine.base import Base
from engine.errors import BadSetting
from engine.stored_names import names_for_peft


def take_weights(base: Base, name: str, folder: Path) -> None:
    """Give a new adapter on the base the weights of one in a folder.

    Args:
        base: With the new adapter.
        name: The new adapter's name.
        folder: As PEFT loads it.

    Raises:
        BadSetting: The two differ in a tensor, a shape or a scaling, or the folder cannot be read.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        stored = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise BadSetting(f"the initial adapter cannot be read: {error}") from error
    # These share their memory with the parameters.
    held = get_peft_model_state_dict(base.model, adapter_name=name, save_embedding_layers=False)
    names = names_for_peft(base.model.get_base_model(), held)
    _require_the_same({names[own]: tuple(tensor.shape) for own, tensor in held.items()}, stored)
    for path, layer in base.model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            scaling, own_scaling = scaling_of(config, path, layer), layer.scaling[name]
            if not math.isclose(scaling, own_scaling, rel_tol=1e-6):
                raise BadSetting(f"the initial adapter scales {path} by {scaling:g}, and the run by {own_scaling:g}")
    with torch.no_grad():
        for own, tensor in held.items():
            tensor.copy_(stored[names[own]])
    taken = get_peft_model_state_dict(base.model, adapter_name=name, save_embedding_layers=False)
    for own, tensor in taken.items():
        if not torch.equal(tensor.cpu(), stored[names[own]].to(tensor.dtype)):
            raise BadSetting(f"the weights of the initial adapter cannot be taken over at {own}")


def _require_the_same(wanted: dict[str, tuple[int, ...]], stored: dict[str, torch.Tensor]) -> None:
    lacking, over = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if lacking or over:
        what = f"has no tensor {lacking[0]}" if lacking else f"has a tensor {over[0]}, for which the run has no place"
        raise BadSetting(f"the initial adapter {what}", ["train a new adapter"])
    for name, shape in wanted.items():
        if tuple(stored[name].shape) != shape:
            raise BadSetting(f"the initial adapter's {name} is {tuple(stored[name].shape)}, and the run's {shape}")


def initial_folder(command: Train) -> Path | None:
    """Return the folder of the adapter that a run continues; None where it continues none.

    An adapter that is only handed out from a checkpoint needs none: its weights are in the checkpoint.

    Raises:
        BadSetting: The run is to continue one, and none is named.
    """
    if command.initial_adapter_path is not None:
        return Path(command.initial_adapter_path)
    if command.config.init_weights == "adapter" and not command.hands_out:
        raise BadSetting("init_weights is 'adapter', and no adapter is named")
    return None


class InitialWeights:
    """A frozen copy of an adapter's parameters as they are now.

    It takes their memory once more: no gradient, no state of an optimizer. The parameters point to it while it
    computes, so that everything about the adapter but its numbers is the same: layers, scaling, experts, magnitudes.

    Args:
        parameters: Of the adapter that is trained.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._kept = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute with the copy inside the block. No pass with a gradient may be under way."""
        trained = [parameter.data for parameter, _ in self._kept]
        try:
            for parameter, copy in self._kept:
                parameter.data = copy
            yield
        finally:
            for (parameter, _), own in zip(self._kept, trained, strict=True):
                parameter.data = own
