"""What a model's tensors are called in its files; transformers may hold them under other names or in other pieces."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


class StoredNames:
    """Turns a model's tensors back into those of its files.

    Args:
        model: As transformers loaded it, without adapters around it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        mapping = getattr(model, "_weight_conversions", None)
        if mapping is None:  # it was not loaded from files
            mapping = get_model_conversion_mapping(model, add_legacy=False)
        reverse = [conversion.reverse_transform() for conversion in mapping[::-1]]
        self._renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Return the tensors that are turned back together, in order.

        A tensor stands for itself unless the files hold several as one.

        Source: `revert_weight_conversion` of transformers 5.17, which collects them by the same name.
        """
        found: dict[str, list[str]] = {}
        for name in names:
            target, _ = rename_source_key(name, self._renamings, self._converters, reverse=True)
            found.setdefault(target, []).append(name)
        return [sorted(group, key=dot_natural_key) for group in found.values()]

    def revert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a whole group, or several, as the files hold it."""
        reverted = revert_weight_conversion(self._model, tensors)
        return {name: tensor.contiguous() for name, tensor in reverted.items()}

    def of(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes that a whole group has in the files."""
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.revert(empty).items()}


_PEFT_PREFIX = "base_model.model."


def names_for_peft(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the name that each of an adapter's tensors must have in its file.

    PEFT renames what it reads as transformers renames the base's files. A name in memory that this would change (it
    makes `shared_experts` of `shared_expert.`, so `shared_experts.` becomes `shared_experts..`) is written as the
    base's files have it.

    Args:
        model: The base, without adapters around it.
        names: As PEFT has them in memory, `base_model.model.` before them.

    Returns:
        Name in memory → name in the file: the same, but for those.

    Source: `convert_peft_adapter_state_dict_for_transformers` of PEFT 0.21.
    """
    if get_checkpoint_conversion_mapping(getattr(model.config, "model_type", None)) is None:
        return {name: name for name in names}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    reverse = [entry.reverse_transform() for entry in reversed(renamings)]
    written = {}
    for name in names:
        held = name.removeprefix(_PEFT_PREFIX)
        written[name] = name
        if rename_source_key(held, renamings, [])[0] != held:
            stored, _ = rename_source_key(held, reverse, [], reverse=True)
            if rename_source_key(stored, renamings, [])[0] == held:
                written[name] = f"{_PEFT_PREFIX}{stored}"
    return written
