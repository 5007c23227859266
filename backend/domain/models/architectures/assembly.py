"""From layers to a whole model: embeddings, head, last norm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from domain.models.architectures.reader import ConfigReader
from domain.models.shape import Block, ModelShape, Part

Builder = Callable[[ConfigReader, str], ModelShape]


@dataclass(frozen=True)
class Family:
    """A model type and how its shape is read.

    Attributes:
        defaults: What its configuration class assumes where the file is silent.
        obstacle: Why the engine cannot load it, or None.
        adapts_experts: As in ModelShape.
    """

    build: Builder
    defaults: Mapping[str, Any]
    obstacle: str | None = None
    adapts_experts: bool = False


def blocks_by_kind(container: str, parts: list[Part]) -> tuple[Block, ...]:
    """Put layers of one kind into one block each.

    Args:
        parts: The layers in order.
    """
    kinds: dict[Part, list[int]] = {}
    for index, part in enumerate(parts):
        kinds.setdefault(part, []).append(index)
    return tuple(Block(container, tuple(indexes), part) for part, indexes in kinds.items())


def repeated(container: str, part: Part, layers: int) -> tuple[Block, ...]:
    """Make a block of equal layers."""
    return (Block(container, tuple(range(layers)), part),)


def assemble(
    reader: ConfigReader,
    model_type: str,
    blocks: tuple[Block, ...],
    *,
    hidden: int,
    last_norm: Part,
    positions: int = 0,
    head_bias: bool = False,
    position_names: tuple[str, ...] = ("max_position_embeddings", "n_positions"),
    softcap_name: str = "final_logit_softcapping",
) -> ModelShape:
    """Add the embeddings, the head and the last norm to the layers.

    Args:
        positions: Learned position embeddings.
        head_bias: Whether the output head has a bias.
        position_names: Where the longest sequence is written.

    Raises:
        NotKnown: A dimension is missing.
    """
    vocab = reader.size("vocab_size")
    tied = reader.flag("tie_word_embeddings", True)
    longest = next((name for name in position_names if reader.value(name) is not None), None)
    return ModelShape(
        model_type=model_type,
        hidden=hidden,
        vocab=vocab,
        max_positions=reader.size(longest) if longest is not None else None,
        tied_embeddings=tied,
        blocks=blocks,
        embedding_parameters=(vocab + positions) * hidden,
        head_parameters=(0 if tied else vocab * hidden) + (vocab if head_bias else 0),
        other_parameters=last_norm.others,
        softcapped=bool(reader.value(softcap_name)),
    )
