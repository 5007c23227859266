"""Whether an adapter from elsewhere fits its base: each of its layers is there, in its shape, and none is missing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from domain.models.shape import ADAPTED, Linear, ModelShape
from domain.peft.layer_names import ExpressionRejected, Matcher, is_targeted

# Of a path whose layer is among stacked experts; PEFT turns the names of transformers 4 there into its own.
_EXPERTS = ("expert", "moe", "mlp", "feed_forward", "ffn")
# Roles of modules that settings may name and that answers do not depend on, or that PEFT does not adapt.
_WITHOUT_EFFECT = ("unreached", "refused", "special")


@dataclass(frozen=True)
class Fitting:
    """How an adapter fits.

    Attributes:
        problem: Why it does not, or None.
        lacks_idle: Whether its settings name layers that it has no weights for and that no answer depends on.
    """

    problem: str | None = None
    lacks_idle: bool = False


def fit(
    layers: Mapping[str, tuple[int, int]],
    targeting: Mapping[str, Any],
    shape: ModelShape,
    matcher: Matcher | None = None,
) -> Fitting:
    """Compare an adapter with its base.

    A base with parts for pictures or sound is not judged: an adapter may name its layers as an earlier transformers
    did, and PEFT knows those names. The load tells then.

    Args:
        layers: Input and output features by layer, as the adapter's weights have them.
        targeting: The settings that name layers, as they came: target_modules, exclude_modules, layers_to_transform,
            layers_pattern.
        shape: The base.
        matcher: Matches expressions. One that takes too long decides nothing.
    """
    own = dict(_linears(shape))
    if any(linear.role == "tower" for linear in own.values()):
        return Fitting()
    judged = {path: features for path, features in layers.items() if not _is_open(shape, path)}
    problem = _strangers(judged, own, shape) or _misfits(judged, own)
    if problem is not None:
        return Fitting(problem)
    closed = {path: linear for path, linear in own.items() if not _is_open(shape, path)}
    return _missing(layers, targeting, closed, matcher or Matcher())


def _linears(shape: ModelShape) -> Iterator[tuple[str, Linear]]:
    """Yield path and kind of every linear module but the head."""
    for block in shape.blocks:
        for index in block.indexes:
            for linear in block.part.linears:
                yield f"{block.container}.{index}.{linear.path}", linear
    for linear in shape.outside.linears:
        yield linear.path, linear


def _is_open(shape: ModelShape, path: str) -> bool:
    return shape.stacked_parameters > 0 and any(word in path for word in _EXPERTS)


def _strangers(layers: Mapping[str, tuple[int, int]], own: Mapping[str, Linear], shape: ModelShape) -> str | None:
    """Say which layers the base does not have."""
    strange = [path for path, features in layers.items() if not _is_there(path, features, own, shape)]
    if not strange:
        return None
    leaf = strange[0].rpartition(".")[2]
    alike = next((path for path in own if path.rpartition(".")[2] == leaf), None) or next(iter(own), None)
    named = f", as it has {alike}" if alike is not None else ""
    return f"it has weights for {strange[0]}{_and_more(len(strange))}, and the base has no layer of that name{named}"


def _is_there(path: str, features: tuple[int, int], own: Mapping[str, Linear], shape: ModelShape) -> bool:
    if path in own:
        return True
    places = [(f"{block.container}.{index}.", block.container) for block in shape.blocks for index in block.indexes]
    within = next((path.removeprefix(place) for place, _ in places if path.startswith(place)), None)
    if within is not None:  # a module that several layers share is described in one of them
        return any(linear.path == within for block in shape.blocks for linear in block.part.linears)
    outside = not any(path.startswith(f"{container}.") for _, container in places)
    return outside and features == (shape.hidden, shape.vocab)  # the head, whatever its name


def _misfits(layers: Mapping[str, tuple[int, int]], own: Mapping[str, Linear]) -> str | None:
    """Say which layers have other features than the base's."""
    for path, (fan_in, fan_out) in layers.items():
        linear = own.get(path)
        if linear is not None and (fan_in, fan_out) != (linear.fan_in, linear.fan_out):
            return (
                f"its {path} takes {fan_in} features and gives {fan_out}, and the base's takes {linear.fan_in} and "
                f"gives {linear.fan_out}"
            )
    return None


def _missing(
    layers: Mapping[str, Any], targeting: Mapping[str, Any], own: Mapping[str, Linear], matcher: Matcher
) -> Fitting:
    """Say which layers the settings name and the weights lack."""
    try:
        named = [path for path in own if path not in layers and is_targeted(targeting, path, matcher)]
    except ExpressionRejected:
        return Fitting()  # the layers that there are weights for are served, whatever was meant beside them
    if targeting.get("target_modules") == "all-linear":
        named = [path for path in named if own[path].role in ADAPTED]
    lost = [path for path in named if own[path].role not in _WITHOUT_EFFECT]
    if not lost:
        return Fitting(lacks_idle=bool(named))
    return Fitting(
        f"its settings name {lost[0]}{_and_more(len(lost))}, and it has no weights there; if that is meant, name in "
        "target_modules or layers_to_transform what it adapts"
    )


def _and_more(count: int) -> str:
    return f" and {count - 1} more layers" if count > 2 else " and one more layer" if count == 2 else ""
