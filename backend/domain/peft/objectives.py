"""What a fine-tune learns from: answers, pairs of answers, or judged answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Objective = Literal["sft", "dpo", "orpo", "kto"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class ObjectiveSpec:
    """What defines an objective.

    Attributes:
        formats: The formats of datasets that it learns from.
        learns_from: What its rows are, in a sentence.
        sequences: Token sequences that go through the model for each row, with a gradient.
        refers: Whether it compares with the base under the adapter.
        rate_factor: What the learning rate of `sft` is multiplied by.
        paper: Where it is from.
    """

    name: str
    formats: frozenset[str]
    learns_from: str
    sequences: int
    refers: bool
    rate_factor: float
    paper: str


_ANSWERS = frozenset({"messages", "sharegpt", "alpaca", "prompt_completion", "text"})
# TRL's defaults are 2e-5 for SFT, and 1e-6 for DPO, ORPO and KTO (SFTConfig, DPOConfig, ORPOConfig, KTOConfig).
_GENTLER = 0.05
SPECS: Mapping[Objective, ObjectiveSpec] = MappingProxyType(
    {
        "sft": ObjectiveSpec("supervised", _ANSWERS, "answers or text", 1, False, 1.0, ""),
        "dpo": ObjectiveSpec(
            "DPO",
            frozenset({"preference"}),
            "preferences (a better and a worse answer)",
            2,
            True,
            _GENTLER,
            "https://arxiv.org/abs/2305.18290",
        ),
        "orpo": ObjectiveSpec(
            "ORPO",
            frozenset({"preference"}),
            "preferences (a better and a worse answer)",
            2,
            False,
            _GENTLER,
            "https://arxiv.org/abs/2403.07691",
        ),
        "kto": ObjectiveSpec(
            "KTO",
            frozenset({"kto"}),
            "judged answers (each good or bad)",
            1,
            True,
            _GENTLER,
            "https://arxiv.org/abs/2402.01306",
        ),
    }
)
# What a dataset is learned from by, unless the client says otherwise.
OBJECTIVE_OF_FORMAT: Mapping[str, Objective] = MappingProxyType({"preference": "dpo", "kto": "kto"})


def objectives_of(dataset_format: str) -> list[Objective]:
    """Return the objectives that learn from a format, the usual one first."""
    return sorted(
        (name for name, spec in SPECS.items() if dataset_format in spec.formats),
        key=lambda name: name != usual_objective(dataset_format),
    )


def usual_settings(dataset_format: str) -> dict[str, Any]:
    """Return the settings that a dataset's format asks for where the client sets none."""
    if dataset_format == "text":
        return {"train_on": "all"}  # a text has no answers
    objective = usual_objective(dataset_format)
    return {"objective": objective} if objective != "sft" else {}


def usual_objective(dataset_format: str) -> Objective:
    """Return the objective for a dataset's format where the client names none."""
    return OBJECTIVE_OF_FORMAT.get(dataset_format, "sft")
