"""The parameter-efficient methods: what each one fixes, what it may be combined with, and where it is from."""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class Algorithm(StrEnum):
    """The methods a client can ask for."""

    LORA = "lora"
    QLORA = "qlora"
    DORA = "dora"
    PISSA = "pissa"
    RSLORA = "rslora"


@dataclass(frozen=True)
class AlgorithmSpec:
    """What defines a method.

    Attributes:
        fixed: Settings that make the method what it is. An override that contradicts one is refused.
        refused: Setting → values that cannot be combined with the method, each with the reason.
        defaults: Settings the method prefers, which an override may change.
        reasons: Why each of `fixed` and `defaults` has its value.
    """

    id: Algorithm
    name: str
    summary: str
    paper: str
    fixed: MappingProxyType[str, Any]
    refused: MappingProxyType[str, MappingProxyType[Any, str]]
    defaults: MappingProxyType[str, Any]
    reasons: MappingProxyType[str, str]
    memory: str
    speed: str


_PISSA_ELSEWHERE = "PiSSA is an algorithm of its own: choose the algorithm 'pissa'"
_NO_PISSA_INIT = MappingProxyType({"pissa": _PISSA_ELSEWHERE})
_NO_INT8_RESIDUAL = (
    "the frozen residual is quantised as in the paper's QPiSSA, to 4-bit NormalFloat; 8-bit storage has no published "
    "counterpart, use 'nf4' or 'none'"
)
_PLAIN = {"use_rslora": "scaled by alpha / r", "use_dora": "direction and magnitude are not separated"}


def _spec(
    algorithm: Algorithm,
    name: str,
    summary: str,
    paper: str,
    *,
    fixed: dict[str, Any],
    refused: dict[str, dict[Any, str]],
    defaults: dict[str, Any],
    reasons: dict[str, str],
    memory: str,
    speed: str,
) -> AlgorithmSpec:
    frozen_refused = {key: MappingProxyType(value) for key, value in refused.items()}
    return AlgorithmSpec(
        algorithm,
        name,
        summary,
        paper,
        MappingProxyType(fixed),
        MappingProxyType(frozen_refused),
        MappingProxyType(defaults),
        MappingProxyType(reasons),
        memory,
        speed,
    )


SPECS: MappingProxyType[Algorithm, AlgorithmSpec] = MappingProxyType(
    {
        Algorithm.LORA: _spec(
            Algorithm.LORA,
            "LoRA",
            "Adds a trainable low-rank product B·A, scaled by alpha / r, beside frozen weights.",
            "https://arxiv.org/abs/2106.09685",
            fixed={},
            refused={"init_weights": dict(_NO_PISSA_INIT)},
            defaults={"use_rslora": False, "use_dora": False, "init_weights": "default", "quantization": "none"},
            reasons={**_PLAIN, "init_weights": "B starts at zero, so training starts from the base's output"},
            memory="The base at full precision, plus 16 bytes a trainable parameter in fp32 with Adam.",
            speed="The reference.",
        ),
        Algorithm.QLORA: _spec(
            Algorithm.QLORA,
            "QLoRA",
            "LoRA on a base whose linear weights are stored as 4-bit NormalFloat with double quantisation.",
            "https://arxiv.org/abs/2305.14314",
            fixed={"quantization": "nf4"},
            refused={"init_weights": dict(_NO_PISSA_INIT)},
            defaults={"use_rslora": False, "use_dora": False, "init_weights": "default"},
            reasons={**_PLAIN, "quantization": "4-bit NF4 storage is what makes LoRA QLoRA"},
            memory="Linear weights take about 0.52 bytes a parameter; embeddings, norms and head stay as they are.",
            speed="Slower than LoRA a step: weights are dequantised on every use, on a CPU noticeably so.",
        ),
        Algorithm.DORA: _spec(
            Algorithm.DORA,
            "DoRA",
            "Splits each weight into magnitude and direction; LoRA moves the direction, a vector the magnitude.",
            "https://arxiv.org/abs/2402.09353",
            fixed={"use_dora": True},
            refused={"init_weights": dict(_NO_PISSA_INIT)},
            defaults={"use_rslora": False, "init_weights": "default", "quantization": "none"},
            reasons={"use_dora": "the decomposition is the method", "use_rslora": "scaled by alpha / r"},
            memory="LoRA's, plus one magnitude per output feature and a dense temporary per target.",
            speed="Slower than LoRA: the norm of every adapted weight is computed on each forward pass.",
        ),
        Algorithm.PISSA: _spec(
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
        ),
        Algorithm.RSLORA: _spec(
            Algorithm.RSLORA,
            "rsLoRA",
            "LoRA scaled by alpha / √r, which keeps updates stable as the rank grows.",
            "https://arxiv.org/abs/2312.03732",
            fixed={"use_rslora": True},
            refused={"init_weights": dict(_NO_PISSA_INIT)},
            defaults={"use_dora": False, "init_weights": "default", "quantization": "none"},
            reasons={"use_rslora": "the scaling alpha / √r is the method", "use_dora": _PLAIN["use_dora"]},
            memory="LoRA's.",
            speed="LoRA's.",
        ),
    }
)
