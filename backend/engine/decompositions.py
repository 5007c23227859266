"""The methods that start from a decomposition of each weight: a row for each, and the arithmetic of its factors.

A row is named as `init_weights` is. Each method freezes F = W − s·B'A' in place of W and starts at F + s·B₀A₀:

    PiSSA    B'A' = B₀A₀, the r largest singular values of W (arXiv 2404.02948, section 3)
    OLoRA    B'A' = B₀A₀, the first r columns of Q and rows of R in W = QR (arXiv 2406.01775, algorithm 1)
    LoftQ    on 4 bits alone: B₀A₀ is the best correction of what rounding F lost, and B'A' the correction before it,
             or nothing after one iteration (arXiv 2310.08659, algorithm 1)

`engine.initialisation` carries them out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from domain.peft.config import PeftConfig

Factors = tuple[torch.Tensor, torch.Tensor]  # A as (r, in) and B as (out, r)


@dataclass(frozen=True)
class Decomposition:
    """How a method gets A and B.

    Attributes:
        factors: Returns A and B from an fp32 matrix of (out, in), the rank r, and the scaling s of the product.
        of_rounding: Whether it decomposes the error of rounding the weight, in turns with the rounding. Otherwise it
            decomposes the weight.
    """

    factors: Callable[[torch.Tensor, int, float], Factors]
    of_rounding: bool = False


def principal_factors(weight: torch.Tensor, rank: int, scaling: float) -> Factors:
    """Return A and B whose product, scaled, is the best approximation of a weight of that rank.

    Source: PiSSA (arXiv 2404.02948), equations 2 and 3; the arithmetic is PEFT's (`LoraLayer.pissa_init`).
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag(torch.sqrt(values[:rank] / scaling))
    return root @ right[:rank], left[:, :rank] @ root


def orthonormal_factors(weight: torch.Tensor, rank: int, _scaling: float) -> Factors:
    """Return A and B from a QR decomposition, B with orthonormal columns.

    Source: OLoRA (arXiv 2406.01775), algorithm 1; the arithmetic is PEFT's (`LoraLayer.olora_init`), which scales
    what is subtracted and not the factors.
    """
    q, r = torch.linalg.qr(weight)
    # Views would keep all of Q and R; and a product's bits may depend on how its factors lie in memory.
    return r[:rank].clone(), q[:, :rank].clone(memory_format=torch.contiguous_format)


DECOMPOSITIONS: Mapping[str, Decomposition] = MappingProxyType(
    {
        "pissa": Decomposition(principal_factors),
        "olora": Decomposition(orthonormal_factors),
        "loftq": Decomposition(principal_factors, of_rounding=True),
    }
)


def freezes_others(config: PeftConfig) -> bool:
    """Tell whether a run of this configuration freezes other weights than the base's.

    The first iteration of LoftQ rounds the weights as the base does anyway.
    """
    decomposition = DECOMPOSITIONS.get(config.init_weights)
    if decomposition is None:
        return False
    return not decomposition.of_rounding or (config.loftq_iterations or 1) > 1
