"""A model's layers, told apart by kind: layers of one kind are built alike and compute alike."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layer:
    """A member of one of the model's lists of layers.

    Attributes:
        container: Path of the list.
        index: Its place there.
        module: It.
        kind: A number that layers of one kind share.
        first: Whether it is the first of its kind.
    """

    container: str
    index: int
    module: nn.Module
    kind: int
    first: bool

    @property
    def prefix(self) -> str:
        """Its path, with a dot."""
        return f"{self.container}.{self.index}."


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the layers: the members of the outermost lists of modules that have parameters.

    A list of linear modules is none: its members stand for themselves.
    """
    kinds: dict[Hashable, int] = {}
    shared: set[int] = set()
    layers = []
    for container, members in _lists(model, ""):
        for index, member in enumerate(members):
            marks = _marks(container, member, shared)
            first = marks not in kinds
            layers.append(Layer(container, index, member, kinds.setdefault(marks, len(kinds)), first))
            shared |= {id(parameter) for parameter in member.parameters()}
    return layers


def _lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            plain = all(next(member.children(), None) is None for member in child)
            if not plain and next(child.parameters(), None) is not None:
                yield prefix + name, child
        else:
            yield from _lists(child, f"{prefix}{name}.")


def _marks(container: str, layer: nn.Module, shared: set[int]) -> Hashable:
    """Return what tells a layer's kind: its parameters, which of them are an earlier layer's, its modules' switches."""
    parameters = tuple(
        (name, tuple(parameter.shape), parameter.dtype, id(parameter) in shared)
        for name, parameter in layer.named_parameters()
    )
    switches = tuple(
        (path, name, value)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | str) and not name.startswith("_")
    )
    return container, type(layer).__name__, parameters, switches


def chunk_of(layer: nn.Module) -> int:
    """Return how many tokens a layer that carries a state computes at a time, 1 where its modules say nothing."""
    values = [value for module in layer.modules() if type(value := getattr(module, "chunk_size", None)) is int]
    return max([1, *values])


def window_of(layer: nn.Module) -> int | None:
    """Return how many tokens a layer's attention looks back, if not to the start."""
    for module in layer.modules():
        value = getattr(module, "sliding_window", None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
