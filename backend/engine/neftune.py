"""NEFTune: noise on the embeddings of training rows."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def add_noise(embeddings: nn.Module, alpha: float) -> RemovableHandle:
    """Add uniform noise to the output of a module of embeddings while it trains. The handle takes the noise off again.

    Args:
        embeddings: Maps B × T ids to B × T × H.
        alpha: The noise is within ± alpha / √(T · H).

    Source: NEFTune (arXiv 2310.05914), algorithm 1.
    """

    def noisy(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        most = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.zeros_like(output).uniform_(-most, most)

    return embeddings.register_forward_hook(noisy)
