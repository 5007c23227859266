"""The peak learning rate by model size and by how strongly the adapter's output is scaled."""

import math

from domain.models.shape import ModelShape
from domain.peft.algorithms import SPECS, Algorithm

# "LoRA Without Regret" (Thinking Machines Lab, 2025), section on setting the learning rate:
# 5e-5 · 10 · (2000 / H)^p with H the hidden size and p fitted over Llama and Qwen models, for alpha = 32 and alpha / r.
_FULL_FINE_TUNING = 5e-5
_LORA_FACTOR = 10.0
_REFERENCE_HIDDEN = 2000
_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
_ALPHA = 32
# rsLoRA's alpha / √r needs a lower rate than alpha / r; its paper finds one rate for all ranks. At rank 16 a quarter
# would be the same; the embedded model learned more at this (bench/learning.py, 20 steps of alpaca: 1.547, not 1.556).
_RSLORA_FACTOR = 0.4
# QLoRA (arXiv 2305.14314), table 9: 2e-4 up to 13 billion parameters.
_UNKNOWN = 2e-4
# What starts from parts of the weights moves those themselves, for which the law was not fitted.
_UNSCALED = 2e-4


def default_learning_rate(
    shape: ModelShape | None, algorithm: Algorithm, *, alpha: int, use_rslora: bool, lora_plus_ratio: float | None
) -> tuple[float, str]:
    """Return a rate to start from, and why.

    No model much below the reference size was in the fit: smaller ones get its 5e-4. A family that was not in the fit
    gets the milder exponent of the two. While B is near zero a step moves the weights by rate times scaling, so the
    rate falls as alpha rises.

    Args:
        shape: The model, or None where none is named or its layers are not known.
        algorithm: The method.
        alpha: Scaling numerator.
        use_rslora: Whether it is divided by √r.
        lora_plus_ratio: B's rate over A's, which this is; None where there is one rate. The best one rate lies between
            LoRA+'s two, so their geometric mean is kept.

    Source: "LoRA Without Regret", thinkingmachines.ai/blog/lora; rsLoRA (arXiv 2312.03732), section 3; LoRA+ (arXiv
    2402.12354), figures 2 and 3.
    """
    if SPECS[algorithm].unscaled:
        name = SPECS[algorithm].name
        rate, reason = _UNSCALED, f"{name} starts from parts of the weights: the law for LoRA's rate does not cover it"
    else:
        rate, reason = _of_the_model(shape, alpha, use_rslora=use_rslora)
    if lora_plus_ratio is not None:
        rate /= math.sqrt(lora_plus_ratio)
        reason += f"; A's, the geometric mean with B's being that (lora_plus_ratio={lora_plus_ratio:g})"
    return float(f"{min(1.0, rate):.2g}"), reason


def _of_the_model(shape: ModelShape | None, alpha: int, *, use_rslora: bool) -> tuple[float, str]:
    if shape is None:
        return _UNKNOWN, "QLoRA paper, table 9; with a model named, by its hidden size"
    family = next((name for name in _EXPONENTS if shape.family.startswith(name)), None)
    exponent = _EXPONENTS[family] if family is not None else min(_EXPONENTS.values())
    hidden = max(shape.hidden, _REFERENCE_HIDDEN)
    rate = _FULL_FINE_TUNING * _LORA_FACTOR * (_REFERENCE_HIDDEN / hidden) ** exponent
    scaling = _ALPHA / alpha * (_RSLORA_FACTOR if use_rslora else 1.0)
    reason = f"'LoRA Without Regret': 5e-4 · (2000 / {hidden})^{exponent:g}"
    if scaling != 1.0:
        reason += f", times {scaling:.3g} for the scaling by alpha={alpha}{' / √r' if use_rslora else ''}"
    return rate * scaling, reason
