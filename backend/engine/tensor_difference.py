"""Whether a tensor of an export is what it must be, but for the rounding of its type."""

import torch

from engine.stock_model import ExpectedTensor

# Sums in fp32 in another order, of ranks up to some hundreds: measured below 2^-22 of the largest number in them.
_ORDER_OF_SUMS = 2.0**-19
# bitsandbytes on a GPU rounds the scale of a few blocks of 64 to the next of its 256 steps.
_OTHER_SCALE = 2.0**-6
_Q8_BLOCK = 32


def difference(found: torch.Tensor, expected: ExpectedTensor, *, rounded: bool = False, blocks: bool = False) -> str:
    """Say how a tensor differs from what it must be; nothing where it does not.

    A tensor that no adapter corrects has to be the base's to the bit. One that is corrected is computed in fp32 and
    rounded once: it may be off by half a step of its type, and by what another order of sums makes.

    Args:
        found: As the export holds it.
        expected: What it must be.
        rounded: Whether the base's weights were rounded to few bits on another device.
        blocks: Whether it was packed as GGUF's Q8_0.
    """
    wanted = expected.value
    if found.shape != wanted.shape:
        return f"has the shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    exact = wanted.to(found.dtype)
    if not wanted.is_floating_point() or not (expected.corrected or rounded or blocks):
        same = (found == exact) | (found.isnan() & exact.isnan()) if found.is_floating_point() else found == exact
        return _told(~same, found, wanted, 0.0)
    target, given = wanted.float(), found.float()
    step = torch.finfo(found.dtype)
    allowed = target.abs() * (step.eps / 2 * (1 + 2.0**-8) + _ORDER_OF_SUMS)
    allowed += expected.scale * _ORDER_OF_SUMS + step.tiny * step.eps
    if rounded:
        allowed += target.abs() * _OTHER_SCALE
    if blocks and target.numel() % _Q8_BLOCK == 0:
        largest = target.abs().reshape(-1, _Q8_BLOCK).amax(dim=1, keepdim=True).expand(-1, _Q8_BLOCK)
        # Half a step, and the scale itself is rounded to 11 bits.
        allowed += largest.reshape(target.shape) * (0.5 / 127 + 2.0**-11)
    off = (given - target).abs()
    return _told(~(off <= allowed), found, wanted, float(off.nan_to_num(posinf=0.0).max()))


def _told(wrong: torch.Tensor, found: torch.Tensor, wanted: torch.Tensor, most: float) -> str:
    count = int(wrong.sum())
    if not count:
        return ""
    place = tuple(int(part) for part in wrong.nonzero()[0])
    values = f"{float(found[place]):.6g} instead of {float(wanted[place]):.6g} at {list(place)}"
    far = f", by up to {most:.3g}" if most else ""
    return f"differs in {count} of {wrong.numel()} numbers{far}: {values}"
