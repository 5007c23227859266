"""Which layers a configuration adapts, and what is said of target modules that are none of the model's."""

from collections.abc import Iterable, Sequence

from domain.models.shape import ADAPTED, Role
from domain.peft.config import PeftConfig

# The last part of a module's path, as the families of transformers call theirs.
_HEADS = frozenset({"lm_head", "embed_out", "output_layer", "output_projection", "score", "unembed"})
_EMBEDDINGS = frozenset({
    "embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embed_positions", "position_embeddings",
    "tok_embeddings", "embeddings", "shared",
})  # fmt: skip
_MOST_NAMED = 8  # of the names that a refusal repeats


# What experts are called, which are stacked in tensors: no name of a linear layer means them.
_EXPERTS = frozenset({"experts", "gate_up_proj", "input_linear", "output_linear"})


def is_adapted(config: PeftConfig, role: Role, *, named: bool) -> bool:
    """Tell whether a linear layer gets an adapter.

    Args:
        config: The configuration.
        role: What the layer does.
        named: Whether target_modules names it; without effect where it is `all-linear`.
    """
    if role == "expert" and config.target_experts is True:
        return True
    if config.target_modules != "all-linear":
        return named
    return role in ADAPTED and (role != "expert" or config.target_experts is not False)


def why_refused(names: Sequence[str], known: Iterable[str], *, tied: bool) -> str:
    """Say why target modules are refused.

    A head and an embedding are there, unlike a misspelt layer: they are told apart by what they are called.

    Args:
        names: Of which none is a linear layer that adapters are put on; at least one.
        known: The last parts of the paths of those that are.
        tied: Whether the output head has the embedding's weights.
    """
    heads = [name for name in names if _leaf(name) in _HEADS]
    embeddings = [name for name in names if _leaf(name) in _EMBEDDINGS]
    others = [name for name in names if name not in heads and name not in embeddings]
    said = []
    if others:
        said.append(f"the model has no linear layer named {_listed(others)}")
        if any(_leaf(name) in _EXPERTS for name in others):
            said[-1] += " (target_experts asks for stacked experts)"
    if heads:
        shared = ", whose weights are the embedding's as well" if tied else ""
        said.append(f"{_listed(heads)} names the output head{shared}; adapters are put on the layers before it")
    if embeddings:
        said.append(f"{_listed(embeddings)} names an embedding, which is no linear layer")
    has = "the layers to name are" if heads or embeddings else "it has"
    return f"{'; '.join(said)}; {has} {', '.join(sorted(set(known)))}"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED])
