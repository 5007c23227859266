"""DoRA's layer with its norms computed in blocks of rows, so that no pass makes a second dense weight.

PEFT's layer computes B·A by sending an identity matrix through A and B, adds it to W and takes the norm of each row.
That is two or three dense matrices for each target and pass, and as many when an adapter is made. Here only a block of
their rows exists at a time. While the model answers, its adapter does not change, and the norms are kept from token to
token. Everything else is PEFT's, and the numbers agree with PEFT's to rounding.

Source: DoRA (arXiv 2402.09353), equation 5 and section 4.3; PEFT 0.21, `peft.tuners.lora.dora.DoraLinearLayer`.
"Scaling DoRA" (arXiv 2603.22276) shows that the dense product is not needed. It factors the norm, which cancels digits
where B·A nearly undoes W; blocks do not.
"""

from typing import Any

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from engine.frozen_weights import plain_weight

# The size of a block. It stays in a CPU's cache, and a GPU does not have too many kernels to start.
_BLOCK_BYTES = {"cpu": 2 * 2**20}
_GPU_BLOCK_BYTES = 64 * 2**20


def use_blocks() -> None:
    """Make PEFT use this layer for every DoRA adapter that it makes or loads from now on."""
    variants.DoraLinearLayer = BlockedDora


class BlockedDora(DoraLinearLayer):
    """The magnitudes of one linear layer; `weight` has one a row of W, as PEFT names and saves it."""

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__(fan_in_fan_out)
        self._kept: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def train(self, mode: bool = True) -> "BlockedDora":
        """Forget the norms: an optimizer may change A and B without a trace."""
        self._kept = None
        super().train(mode)
        return self

    def update_layer(
        self, *, base_layer: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, place_on_cpu: bool = False
    ) -> None:
        """Set the magnitudes to the norms of W + s·B·A, from which training then starts."""
        norms = row_norms(self._weight(base_layer), lora_A, lora_B, scaling)
        self.weight = nn.Parameter(norms.to("cpu") if place_on_cpu else norms, requires_grad=True)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        """Return what is added to the base layer's output.

        Args:
            x: (..., in), after dropout.
            lora_A: The module whose weight is (rank, in).
            lora_B: The module whose weight is (out, rank).
            scaling: s.
            base_layer: The module whose weight is W.
            base_result: The base layer's output for x; None with dropout, when it is still to be computed.
            adapter_name: Not used; PEFT passes it.
        """
        # "we suggest treating the norm as a constant, thereby detaching it from the gradient graph" (section 4.3)
        norms = self._norms(base_layer, lora_A.weight, lora_B.weight, scaling)
        scale = (self.weight / norms.to(x.dtype)).view(1, -1)
        if base_result is None:
            # PEFT multiplies by a dense copy in x's type, which autograd then keeps; the layer itself needs no copy.
            weight = base_layer.weight
            own = weight.dtype if weight.is_floating_point() else x.dtype
            base_result = base_layer(x.to(own)).to(x.dtype)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (scale - 1) * base_result + scale * lora_B(lora_A(x)) * scaling

    def _weight(self, base_layer: Any) -> torch.Tensor:
        """Return W as (out, in), dequantised."""
        weight = plain_weight(base_layer)
        return weight.T if self.fan_in_fan_out else weight

    def _norms(self, base_layer: Any, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        if self.training:
            return row_norms(self._weight(base_layer), a, b, scaling)
        # The counters tell changes in place, the addresses tell replaced tensors.
        state = (scaling, *((t.data_ptr(), t._version, t.dtype) for t in (base_layer.weight, a, b)))
        if self._kept is None or self._kept[0] != state:
            self._kept = state, row_norms(self._weight(base_layer), a, b, scaling)
        return self._kept[1]


@torch.no_grad()  # type: ignore[untyped-decorator]
def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the Euclidean norm of each row of W + s·B·A, in fp32.

    Args:
        weight: W, (out, in), of any floating-point type.
        a: (rank, in).
        b: (out, rank).
        scaling: s.

    Returns:
        (out,), on A's device.
    """
    a, b = a.float(), b.float()
    size = _BLOCK_BYTES.get(a.device.type, _GPU_BLOCK_BYTES)
    rows = max(1, size // (4 * weight.shape[1]))
    norms = torch.empty(weight.shape[0], dtype=torch.float32, device=a.device)
    autocast_device = "cpu" if a.is_meta else a.device.type  # tensors without data have no autocast of their own
    with torch.autocast(autocast_device, enabled=False):  # bf16 would round the norm to three digits
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows].to(a.device, torch.float32)
            total = torch.addmm(block, b[start : start + rows], a, alpha=scaling)
            torch.linalg.vector_norm(total, dim=1, out=norms[start : start + rows])
    return norms
