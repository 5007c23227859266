"""The parameter-efficient methods: what each one fixes, what it may be combined with, and where it is from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, Field


class Algorithm(StrEnum):
    """The methods a client can ask for."""

    LORA = "lora"
    QLORA = "qlora"
    DORA = "dora"
    PISSA = "pissa"
    RSLORA = "rslora"
    OLORA = "olora"
    LORA_PLUS = "lora-plus"
    LOFTQ = "loftq"


# Asked for by those who know PEFT, and refused with the reason rather than as unknown.
NOT_OFFERED: MappingProxyType[str, str] = MappingProxyType(
    {
        "corda": "CorDA decomposes each weight by the covariance of its inputs, in × in numbers a layer, which the "
        "memory estimate does not know; 'pissa' and 'olora' start from the weights alone",
        "eva": "EVA passes the rows through the model until every layer's singular vectors have converged, for which "
        "there is no bound: few or short rows never get there; 'pissa' and 'olora' start from the weights",
        "vera": "VeRA trains vectors over random matrices that all layers share, which is no LoRA: merging, GGUF and "
        "the checks of an adapter's files read A and B of each layer; 'lora' with rank 1 or 2 is as small",
        "adalora": "AdaLoRA moves rank between layers by a budget over the run, which checkpoints and the plain LoRA "
        "that is handed out have no place for; 'lora' with named target_modules puts rank where it is wanted",
    }
)


def _offered(value: Any) -> Any:
    if isinstance(value, str) and value in NOT_OFFERED:
        raise ValueError(f"{value} is not offered: {NOT_OFFERED[value]}")
    return value


# As clients name it.
AlgorithmName = Annotated[Algorithm, Field(strict=False), BeforeValidator(_offered)]


@dataclass(frozen=True)
class AlgorithmSpec:
    """What defines a method.

    Attributes:
        fixed: Settings that make the method what it is. An override that contradicts one is refused.
        refused: Setting → values that cannot be combined with the method, each with the reason. A method that does
            not fix `init_weights` also refuses every value by which another method is known.
        defaults: Settings the method prefers, which an override may change.
        reasons: Why each of `fixed` and `defaults` has its value.
        extra: Whether it is beyond the five that every service of this kind has.
        unscaled: Whether its factors are parts of the weights: alpha is r, and nothing of them is dropped.
    """

    id: Algorithm
    name: str
    summary: str
    paper: str
    fixed: Mapping[str, Any]
    refused: Mapping[str, Mapping[Any, str]]
    defaults: Mapping[str, Any]
    reasons: Mapping[str, str]
    memory: str
    speed: str
    extra: bool = False
    unscaled: bool = False


_NO_INT8_RESIDUAL = (
    "the frozen residual is quantised as in the paper's QPiSSA, to 4-bit NormalFloat; 8-bit storage has no published "
    "counterpart, use 'nf4' or 'none'"
)
_PLAIN = {"use_rslora": "scaled by alpha / r", "use_dora": "direction and magnitude are not separated"}
_ROWS = (
    AlgorithmSpec(
        Algorithm.LORA,
        "LoRA",
        "Adds a trainable low-rank product B·A, scaled by alpha / r, beside frozen weights.",
        "https://arxiv.org/abs/2106.09685",
        fixed={},
        refused={},
        defaults={"use_rslora": False, "use_dora": False, "init_weights": "default", "quantization": "none"},
        reasons={**_PLAIN, "init_weights": "B starts at zero, so training starts from the base's output"},
        memory="The base at full precision, plus 16 bytes a trainable parameter in fp32 with Adam.",
        speed="The reference.",
    ),
    AlgorithmSpec(
        Algorithm.QLORA,
        "QLoRA",
        "LoRA on a base whose linear weights are stored as 4-bit NormalFloat with double quantisation.",
        "https://arxiv.org/abs/2305.14314",
        fixed={"quantization": "nf4"},
        refused={},
        defaults={"use_rslora": False, "use_dora": False, "init_weights": "default"},
        reasons={**_PLAIN, "quantization": "4-bit NF4 storage is what makes LoRA QLoRA"},
        memory="Linear weights take about 0.52 bytes a parameter; embeddings, norms and head stay as they are.",
        speed="Slower than LoRA a step: weights are dequantised on every use, on a CPU noticeably so.",
    ),
    AlgorithmSpec(
        Algorithm.DORA,
        "DoRA",
        "Splits each weight into magnitude and direction; LoRA moves the direction, a vector the magnitude.",
        "https://arxiv.org/abs/2402.09353",
        fixed={"use_dora": True},
        refused={},
        defaults={"use_rslora": False, "init_weights": "default", "quantization": "none"},
        reasons={"use_dora": "the decomposition is the method", "use_rslora": "scaled by alpha / r"},
        memory="LoRA's, plus one magnitude per output feature and a dense temporary per target.",
        speed="Slower than LoRA: the norm of every adapted weight is computed on each forward pass.",
    ),
    AlgorithmSpec(
        Algorithm.PISSA,
        "PiSSA",
        "Starts the adapter from the principal singular vectors of each weight and freezes the residual.",
        "https://arxiv.org/abs/2404.02948",
        fixed={"init_weights": "pissa", "use_dora": False},
        refused={"quantization": {"int8": _NO_INT8_RESIDUAL}},
        defaults={"use_rslora": False, "quantization": "none"},
        reasons={
            "init_weights": "starting from the principal singular vectors is the method",
            "use_dora": "magnitudes of a residual weight have no meaning in either paper",
            "alpha": "alpha = r, a scaling of one, as in the paper's section 4",
            "dropout": "the paper trains without dropout: dropping principal components changes the base",
        },
        memory="LoRA's while training; handed out with twice the rank, on the unmodified base.",
        speed="LoRA's a step, after one singular value decomposition per target.",
        unscaled=True,
    ),
    AlgorithmSpec(
        Algorithm.RSLORA,
        "rsLoRA",
        "LoRA scaled by alpha / √r, which keeps updates stable as the rank grows.",
        "https://arxiv.org/abs/2312.03732",
        fixed={"use_rslora": True},
        refused={},
        defaults={"use_dora": False, "init_weights": "default", "quantization": "none"},
        reasons={"use_rslora": "the scaling alpha / √r is the method", "use_dora": _PLAIN["use_dora"]},
        memory="LoRA's.",
        speed="LoRA's.",
    ),
    AlgorithmSpec(
        Algorithm.OLORA,
        "OLoRA",
        "Starts the adapter from the orthonormal basis of each weight's QR decomposition; freezes the rest.",
        "https://arxiv.org/abs/2406.01775",
        fixed={"init_weights": "olora", "use_dora": False},
        refused={"quantization": {"int8": _NO_INT8_RESIDUAL}},
        defaults={"use_rslora": False, "quantization": "none"},
        reasons={
            "init_weights": "starting from an orthonormal basis is the method",
            "use_dora": "magnitudes of a weight that a part was taken out of have no meaning in either paper",
            "alpha": "alpha = r, a scaling of one: the factors are parts of the weight",
            "dropout": "dropping what was taken out of the weight changes the base",
        },
        memory="LoRA's while training; handed out with twice the rank, on the unmodified base.",
        speed="LoRA's a step, after one QR decomposition per target, which is faster than PiSSA's.",
        extra=True,
        unscaled=True,
    ),
    AlgorithmSpec(
        Algorithm.LORA_PLUS,
        "LoRA+",
        "LoRA in which B learns at a rate several times that of A.",
        "https://arxiv.org/abs/2402.12354",
        fixed={},
        refused={
            "lora_plus_ratio": {None: "the ratio of the two rates is the method"},
        },
        defaults={
            "lora_plus_ratio": 16.0,
            "use_rslora": False,
            "use_dora": False,
            "init_weights": "default",
            "quantization": "none",
        },
        reasons={
            **_PLAIN,
            "lora_plus_ratio": "2^4, the ratio that the paper's section 5 recommends",
            "init_weights": "B starts at zero, so training starts from the base's output",
        },
        memory="LoRA's.",
        speed="LoRA's a step; the paper reports up to twice as few steps.",
        extra=True,
    ),
    AlgorithmSpec(
        Algorithm.LOFTQ,
        "LoftQ",
        "QLoRA whose adapter starts as the best correction of what rounding to 4 bits lost.",
        "https://arxiv.org/abs/2310.08659",
        fixed={"init_weights": "loftq", "quantization": "nf4", "use_dora": False},
        refused={"loftq_iterations": {None: "LoftQ alternates at least once"}},
        defaults={"loftq_iterations": 1, "use_rslora": False},
        reasons={
            "init_weights": "starting from the rounding's correction is the method",
            "quantization": "there is nothing to correct in weights that are not rounded",
            "use_dora": "the correction is of the weights, not of their direction",
            "loftq_iterations": "one leaves the 4-bit base as it is, so that the adapter is exact on it; more "
            "round the weights anew for the run",
            "use_rslora": _PLAIN["use_rslora"],
            "alpha": "alpha = r, a scaling of one: the factors are the correction itself",
            "dropout": "dropping the correction brings the rounding back",
        },
        memory="QLoRA's; with more than one iteration handed out with twice the rank.",
        speed="QLoRA's a step, after one singular value decomposition per target and iteration.",
        extra=True,
        unscaled=True,
    ),
)


def _with_refused_starts(rows: tuple[AlgorithmSpec, ...]) -> dict[Algorithm, AlgorithmSpec]:
    """Refuse a method's start with every other method.

    PiSSA with a default that says LoRA would be no answer to "which method was it?"
    """
    starts = {
        spec.fixed["init_weights"]: f"{spec.name} is an algorithm of its own: choose the algorithm '{spec.id.value}'"
        for spec in rows
        if "init_weights" in spec.fixed
    }
    return {
        spec.id: spec
        if "init_weights" in spec.fixed
        else replace(spec, refused={"init_weights": starts, **spec.refused})
        for spec in rows
    }


SPECS: MappingProxyType[Algorithm, AlgorithmSpec] = MappingProxyType(_with_refused_starts(_ROWS))
