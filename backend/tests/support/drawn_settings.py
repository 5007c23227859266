"""Draws whole configurations: every field of PeftConfig, from its own bounds, that can take effect on a CPU."""

import math
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st

from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.config import PARAMETER_NAMES, PeftConfig

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEEDS_A_GPU = {"precision": "fp16", "quantization": "int8", "optimizer": "adamw_8bit"}
# What a run of some steps on the tiny model can show; always within the field's own bounds.
PRACTICAL: dict[str, tuple[float, float]] = {
    "rank": (1, 16),
    "alpha": (1, 64),
    "dropout": (0.0, 0.5),
    "learning_rate": (1e-5, 3e-3),
    "batch_size": (1, 8),
    "gradient_accumulation": (1, 4),
    "epochs": (0.2, 2.0),
    "max_steps": (2, 8),
    "min_learning_rate_ratio": (0.0, 0.9),
    "max_grad_norm": (1e-3, 10.0),
    "adam_beta1": (0.5, 0.95),
    "adam_beta2": (0.9, 0.9999),
    "adam_epsilon": (1e-9, 1e-5),
    "neftune_noise_alpha": (0.0, 15.0),
    "max_seq_length": (20, 96),
    "eval_every_steps": (1, 4),
    "early_stopping_patience": (1, 3),
    "checkpoint_every_steps": (1, 3),
    "lora_plus_ratio": (1.0, 16.0),
    "loftq_iterations": (1, 4),
    "keep_checkpoints": (1, 3),
}
MANY_STEPS_MINUTES = 1e-7  # due after every step
NO_STEP_MINUTES = 600.0


def bounds(name: str) -> tuple[float, float]:
    """Return the least and the greatest value that a run of the tests takes, checked against the field's own."""
    field = PeftConfig.model_fields[name]
    low = max([getattr(item, key) for item in field.metadata for key in ("ge", "gt") if hasattr(item, key)])
    high = min([getattr(item, key) for item in field.metadata for key in ("le", "lt") if hasattr(item, key)])
    least, greatest = PRACTICAL.get(name, (low, high))
    assert low <= least <= greatest <= high, name
    return least, greatest


def values(name: str) -> st.SearchStrategy[Any]:
    """Draw a field's value from its annotation and bounds."""
    if name == "target_modules":
        names = st.lists(st.sampled_from(LLAMA_LINEARS), min_size=1, unique=True)
        return st.just("all-linear") | names
    if name == "target_experts":
        return st.sampled_from(["auto", False])  # the tiny model has none
    if name == "objective":
        return st.just("sft")  # the rows are answers; tests/api/test_dataset_jobs.py has preferences
    if name == "preference_beta":
        return st.none()
    if name == "checkpoint_every_minutes":
        return st.sampled_from([None, MANY_STEPS_MINUTES, NO_STEP_MINUTES])
    return _of(PeftConfig.model_fields[name].annotation, name)


def _of(annotation: Any, name: str) -> st.SearchStrategy[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return st.one_of([_of(part, name) for part in get_args(annotation)])
    if annotation is NoneType:
        return st.none()
    if get_origin(annotation) is Literal:
        return st.sampled_from([value for value in get_args(annotation) if value != NEEDS_A_GPU.get(name)])
    if annotation is bool:
        return st.booleans()
    least, greatest = bounds(name)
    if annotation is int:
        return st.integers(int(least), int(greatest))
    assert annotation is float, f"{name}: no way to draw {annotation}"
    return st.floats(least, greatest, allow_subnormal=False)


def ways() -> list[tuple[Algorithm, str]]:
    """Every method with every storage of the base that it allows and a CPU can do."""
    stored = get_args(PeftConfig.model_fields["quantization"].annotation)
    return [
        (algorithm, quantization)
        for algorithm in Algorithm
        for quantization in stored
        if quantization != NEEDS_A_GPU["quantization"] and _allowed(algorithm, "quantization", quantization)
    ]


@st.composite
def requests(draw: st.DrawFn, algorithm: Algorithm, quantization: str) -> tuple[Algorithm, dict[str, Any]]:
    """Draw a value for each setting that the algorithm leaves open."""
    overrides = {
        name: draw(values(name).filter(partial(_allowed, algorithm, name)))
        for name in PARAMETER_NAMES
        if name != "quantization" and name not in SPECS[algorithm].fixed
    } | {"quantization": quantization}
    if overrides["eval_every_steps"] is None:
        overrides["early_stopping_patience"] = None
    if overrides["scheduler"] == "constant":
        overrides["min_learning_rate_ratio"] = 0.0
    if overrides["max_steps"] is not None:
        del overrides["epochs"]
    # What is practical is so for the greatest rate, and for the product of A and B as it is scaled: a run that diverges
    # differs from its replay by more than rounding, on some processors and not on others.
    rank = overrides["rank"]
    scaling = overrides["alpha"] / (math.sqrt(rank) if overrides.get("use_rslora", True) else rank)
    overrides["learning_rate"] /= max(1.0, scaling) * (overrides["lora_plus_ratio"] or 1.0)
    return algorithm, overrides


def _allowed(algorithm: Algorithm, name: str, value: Any) -> bool:
    spec = SPECS[algorithm]
    if name in spec.fixed:
        return bool(value == spec.fixed[name])
    if name == "loftq_iterations" and spec.fixed.get("init_weights") != "loftq":
        return value is None  # refused: tests/api/test_settings_refused.py
    if (name, value) == ("init_weights", "adapter"):
        return False  # it needs an adapter to continue: tests/engine/test_continuing.py
    return not any(value == refused for refused in spec.refused.get(name, {}))
