"""A model's shape from transformers' own class: built without memory, and passed through once without data.

The class that config.json names is built on the meta device, so every module, size and tie is exact. What its layers
keep for the backward pass, and what no gradient reaches, comes from passes without data (engine/without_data.py).
"""

import copy
import json
import resource
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from domain.models.shape import Block, Kept, Linear, ModelShape, Part, Passes, Role, Stacked
from domain.results import Described
from engine.errors import BadModel
from engine.layer_kinds import Layer, chunk_of, layers_of, window_of
from engine.model_class import attention_of, longest_of, model_class, read_config
from engine.roles import features, linear_modules, output_head, roles, stacked_experts, text_path
from engine.shared_weights import shared_parameters
from engine.without_data import HALF, Passed, WithoutData

_MOST_LAYERS = 1000
_IDLE: tuple[Role, ...] = ("bypassed", "unreached")
# What a stranger's config.json may take: the largest models need some hundred MiB to be described.
_MOST_MEMORY = 6 * 2**30


@dataclass(frozen=True)
class Places:
    """What the parts of a loaded model do.

    Attributes:
        roles: Of every linear module but the head, by its path.
        experts: The stacked experts that a gradient reaches, by the tensors' paths.
        heads: The paths of the output head.
    """

    roles: Mapping[str, Role]
    experts: Mapping[str, Stacked]
    heads: tuple[str, ...] = ()


_places_of: WeakKeyDictionary[nn.Module, Places] = WeakKeyDictionary()
_MOST_KEPT = 8  # an engine holds one model
_kept: dict[tuple[Any, str], Places] = {}


def describe(values: dict[str, Any]) -> Described:
    """Read the shape of the model that a config.json describes.

    Args:
        values: Parsed. It may come from a stranger: no code of the repository is run, and no weight is allocated.
    """
    try:
        chosen, config = model_class(read_config(values))
        model = build(chosen, config)
    except BadModel as error:
        return Described(shape=None, problem=error.message, loadable=False)
    try:
        return Described(shape=_Outline(model, config).shape(str(values["model_type"])))
    except Exception as error:  # noqa: BLE001 - the class' own code, on values that nobody tried
        traceback.print_exc()
        problem = f"{chosen.__name__} cannot be followed without data: {type(error).__name__}: {error}"
        return Described(shape=None, problem=problem[:500])


def limit_memory() -> None:
    """Let this process allocate no more than a description takes: it holds no model."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _MOST_MEMORY if most == resource.RLIM_INFINITY else min(_MOST_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def places(model: Any) -> Places:
    """Say what the parts of a loaded model do, from a copy of its class that holds no weights.

    Unsloth's classes compute with kernels of its own, which fake tensors cannot pass, and some classes of transformers
    look at their tensors' values. There the place of a module among the others tells alone.

    Args:
        model: As transformers loaded it, without adapters or with. It is neither changed nor computed with.
    """
    if model not in _places_of:
        _places_of[model] = (
            _by_place_alone(model) if "unsloth" in sys.modules else places_of_class(type(model), model.config)
        )
    return _places_of[model]


def places_of_class(chosen: Any, config: Any) -> Places:
    """Say what the parts of a class do; the last answers are kept, since a load in four bits asks before and after it.

    Args:
        chosen: The class.
        config: Its configuration. Types and quantisation in it change nothing.

    Raises:
        BadModel: It cannot be built.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    key = chosen, json.dumps(_without_types(config.to_dict()), sort_keys=True, default=str)
    if key not in _kept:
        while len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = _followed(build(chosen, config), config)
    return _kept[key]


def _without_types(values: Any) -> Any:
    """Leave out of a configuration what a load writes into it: types, and where it came from."""
    if not isinstance(values, dict):
        return values
    return {
        str(name): _without_types(value)
        for name, value in values.items()
        if name not in ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures")
    }


def _followed(model: Any, config: Any) -> Places:
    """Say what the parts do; by their place alone where the class cannot be followed without data."""
    head = output_head(model)
    heads = tuple(path for path, module in model.named_modules() if module is head)
    try:
        outline = _Outline(model, config)
        reached = {tensor.path: tensor for tensor in outline.experts() if tensor.reached}
        return Places(outline.roles(), reached, heads)
    except Exception:  # noqa: BLE001 - the class' own code; the engine's log has it
        traceback.print_exc()
        return replace(_by_place_alone(model), heads=heads)


def _by_place_alone(model: Any) -> Places:
    text = text_path(model)
    experts = {tensor.path: tensor for _, tensor in stacked_experts(model) if tensor.path.startswith(text)}
    return Places(roles(model), experts)


def kept_in_full(chosen: Any, config: Any) -> list[str]:
    """Name the modules that must not be stored in fewer bits: the head, and those whose weight is read past them.

    Args:
        chosen: The class.
        config: Its configuration.

    Raises:
        BadModel: It cannot be built.
    """
    found = places_of_class(chosen, config)
    return [*found.heads, *(path for path, role in found.roles.items() if role == "bypassed")]


def build(chosen: Any, config: Any) -> Any:
    """Build a class of transformers on the meta device.

    Raises:
        BadModel: It cannot be built so.
    """
    for part in (config, config.get_text_config(decoder=True)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int | float) and layers > _MOST_LAYERS:  # what is no number fails in the class
            raise BadModel(f"{layers} layers; no model has that many")
    try:
        with torch.device("meta"):
            model = chosen._from_config(config, attn_implementation=attention_of(chosen), dtype=HALF)
    except Exception as error:
        raise BadModel(f"{chosen.__name__} cannot be built: {type(error).__name__}: {error}"[:500]) from error
    model.requires_grad_(False)
    model.train()
    return model


class _Outline:
    """Reads one model's shape."""

    def __init__(self, model: Any, config: Any) -> None:
        self._model, self._text = model, config.get_text_config(decoder=True)
        self._layers = layers_of(model)
        self._inside = tuple(layer.prefix for layer in self._layers)
        self._passes = WithoutData(model, self._text, self._layers)
        self._called, self._reached = self._passes.reached()
        firsts = {layer.kind: layer.prefix for layer in self._layers if layer.first}
        self._firsts = {layer.prefix: firsts[layer.kind] for layer in self._layers}

    def _alike(self, path: str) -> str:
        """Return the path of what is in the same place in the first layer of a kind; the others did not compute."""
        own = next((prefix for prefix in self._firsts if path.startswith(prefix)), None)
        return path if own is None else self._firsts[own] + path.removeprefix(own)

    def experts(self) -> list[Stacked]:
        """Return the stacked experts, by whole paths."""
        return [
            replace(tensor, reached=self._alike(tensor.path) in self._reached)
            for _, tensor in stacked_experts(self._model)
        ]

    def roles(self) -> dict[str, Role]:
        """Say what each linear module does."""
        what = roles(self._model)
        for path, role in what.items():
            alike = self._alike(path)
            if role not in ("tower", "special") and alike not in self._reached:
                what[path] = "unreached" if alike in self._called else "bypassed"
        for names in shared_parameters(self._model):
            held = [path for name in names if (path := name.removesuffix(".weight")) in what]
            # A layer that computes with a weight decides for all that hold it.
            computing = next((what[path] for path in held if what[path] not in _IDLE), None)
            if computing is not None:
                what |= dict.fromkeys(held, computing)
        return what

    def shape(self, family: str) -> ModelShape:
        """Put it together."""
        what = self.roles()
        unfused = self._passes.unfused()
        fused = self._passes.fused(unfused)
        adapts_experts = any(tensor.reached for tensor in self.experts())
        with_experts = self._passes.with_experts(unfused) if adapts_experts else unfused
        embeddings, head = self._embeddings(), self._head()
        owned = {id(parameter) for parameter in (*embeddings, *head)}
        blocks = tuple(
            replace(block, part=replace(block.part, by_experts=_beside(with_experts.kept(kind), unfused.kept(kind))))
            for kind, block in self._blocks(what, fused, unfused, owned)
        )
        outside = self._part(None, what, fused, unfused, owned)
        vocab = int(self._text.vocab_size)
        return ModelShape(
            family=family,
            class_name=type(self._model).__name__,
            attention="sdpa" if attention_of(type(self._model)) == "sdpa" else "eager",
            hidden=int(self._text.hidden_size),
            vocab=vocab,
            max_positions=longest_of(self._text),
            tied_embeddings=not any(parameter.dim() == 2 for parameter in head),
            blocks=blocks,
            outside=outside,
            embedding_parameters=sum(parameter.numel() for parameter in embeddings),
            head_parameters=sum(parameter.numel() for parameter in head),
            logits_kept=unfused.seen(None).logits / (unfused.tokens * vocab),
            chunked_loss=self._passes.has_tail(),
        )

    def _embeddings(self) -> list[nn.Parameter]:
        """Return the weights of all embeddings outside the layers."""
        unique = {}
        for path, module in self._model.named_modules():
            if isinstance(module, nn.Embedding) and not path.startswith(self._inside):
                unique[id(module.weight)] = module.weight
        return list(unique.values())

    def _head(self) -> list[nn.Parameter]:
        """Return the output head's parameters that are not the embedding's."""
        head = output_head(self._model)
        if head is None:
            return []
        shared = {id(parameter) for parameter in self._embeddings()}
        return [parameter for parameter in head.parameters() if id(parameter) not in shared]

    def _blocks(
        self, what: dict[str, Role], fused: Passed, unfused: Passed, owned: set[int]
    ) -> Iterator[tuple[int, Block]]:
        """Yield the layers by kind. Parameters that an earlier layer has are not counted again."""
        kinds: dict[int, list[Layer]] = {}
        for layer in self._layers:
            kinds.setdefault(layer.kind, []).append(layer)
        for kind, members in kinds.items():
            part = self._part(members[0], what, fused, unfused, owned)
            owned |= {id(parameter) for member in members for parameter in member.module.parameters()}
            indexes = tuple(member.index for member in members)
            yield kind, Block(members[0].container, indexes, part, unfused.computes(kind))

    def _part(
        self, layer: Layer | None, what: dict[str, Role], fused: Passed, unfused: Passed, owned: set[int]
    ) -> Part:
        """Describe a layer, or without one what is outside all layers.

        Args:
            owned: Parameters that are counted elsewhere.
        """
        module, kind = (self._model, None) if layer is None else (layer.module, layer.kind)
        linears = tuple(self._linears(layer, what, unfused, owned))
        stacked = () if layer is None else tuple(self._experts_in(layer))
        parameters = {
            id(parameter): parameter.numel() for parameter in module.parameters() if id(parameter) not in owned
        }
        return Part(
            linears=linears,
            stacked=stacked,
            others=sum(parameters.values()) - Part(linears, stacked).parameters,
            inputs=unfused.seen(kind).inputs / unfused.tokens,
            window=window_of(module) if layer is not None else None,
            chunk=chunk_of(module) if layer is not None else 1,
            by_token=unfused.by_token(kind),
            kept=fused.kept(kind),
            unfused=unfused.kept(kind),
            passing=fused.passing(kind),
            passing_unfused=unfused.passing(kind),
        )

    def _experts_in(self, layer: Layer) -> Iterator[Stacked]:
        for _, tensor in stacked_experts(layer.module):
            yield replace(tensor, reached=self._alike(layer.prefix + tensor.path) in self._reached)

    def _linears(
        self, layer: Layer | None, what: dict[str, Role], unfused: Passed, owned: set[int]
    ) -> Iterator[Linear]:
        prefix, seen = ("", unfused.seen(None)) if layer is None else (layer.prefix, unfused.seen(layer.kind))
        counted = set(owned)
        for path, module in linear_modules(self._model):
            elsewhere = not path.startswith(prefix) if layer is not None else path.startswith(self._inside)
            if elsewhere or id(module.weight) in counted:  # a module may be in several places
                continue
            counted.add(id(module.weight))
            reads = seen.reads(path, prefix)
            yield Linear(path.removeprefix(prefix), *features(module), module.bias is not None, reads, what[path])


def _beside(more: Passes, less: Passes) -> Passes:
    """Return what is kept in one pass and not in the other."""
    fields = (
        Kept(one.token - other.token, one.square - other.square)
        for one, other in (
            (more.half, less.half),
            (more.half_masked, less.half_masked),
            (more.full, less.full),
            (more.full_masked, less.full_masked),
        )
    )
    return Passes(*fields)


if __name__ == "__main__":
    # Takes a config.json on the standard input and writes what it describes.
    sys.stdout.write(describe(json.load(sys.stdin)).model_dump_json(indent=1))
