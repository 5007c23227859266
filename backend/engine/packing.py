"""Whether rows that are packed into one sequence are kept apart: shown on the model itself before it is trained so."""

import torch

from engine.base import Base
from engine.errors import BadSetting

_LENGTH = 6  # tokens of each of two rows
# How far logits may be apart, as a part of the largest. A row that sees another one is further off by far; rounding in
# 16 bits, and experts that are chosen by a hair, are not.
_APART = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def require_rows_kept_apart(base: Base) -> None:
    """Refuse packing where a row would see the rows before it in its sequence.

    transformers keeps packed rows apart by their position ids, which start anew at each row. That reaches attention
    masks. It does not reach the state that a state space carries on, nor attention that makes its own masks. So two
    short rows are computed packed and apart.

    Raises:
        BadSetting: The second row's logits differ.
    """
    first, second = (_row(base, start) for start in (1, 2))
    with torch.no_grad(), base.using(None):
        packed = _logits(base, torch.cat([first, second], dim=1))[:, _LENGTH:]
        alone = _logits(base, second)
    apart = float((packed - alone).abs().max()) / max(float(alone.abs().max()), 1e-6)
    if not apart <= _APART.get(base.model.dtype, _APART[torch.bfloat16]):
        raise BadSetting(
            "packing: this model's layers do not keep the rows of one sequence apart: a row's logits change by "
            f"{apart:.0%} with what stands before it",
            ["packing=false: rows of like length are batched together instead"],
        )


def _row(base: Base, start: int) -> torch.Tensor:
    ids = torch.arange(start, start + 7 * _LENGTH, 7) % base.embeddings
    return ids[None].to(base.device)


def _logits(base: Base, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)[None] % _LENGTH
    logits: torch.Tensor = base.model(
        input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False
    ).logits
    return logits.float()
