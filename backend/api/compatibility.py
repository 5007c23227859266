"""POST /api/models/compatibility: whether a fine-tune fits, before anything is downloaded."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from api.hub_token import ASKS_THE_HUB
from api.peft_schemas import ModelId, Request, Response, Revision
from api.waiting import may_ask_the_hub
from domain.memory.estimate import Estimate
from domain.peft.algorithms import Algorithm, AlgorithmName
from services.training.compatibility import CompatibilityService, get_compatibility_service

router = APIRouter(prefix="/api/models", tags=["models"])


class CompatibilityRequest(Request):
    model_id: ModelId
    revision: Revision | None = None
    algorithm: AlgorithmName = Algorithm.LORA
    rank: int | None = Field(default=None, ge=1, le=1024)
    target_modules: Literal["all-linear"] | list[str] | None = None
    target_experts: Literal["auto"] | bool | None = None
    max_seq_length: int | None = Field(default=None, ge=8, le=1_048_576)
    batch_size: int | None = Field(default=None, ge=1, le=1024)
    gradient_checkpointing: bool | None = None
    optimizer: Literal["adamw", "adamw_8bit"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    device: Literal["auto", "cpu"] | Annotated[int, Field(ge=0, le=63)] = "auto"
    memory_bytes: int | None = Field(default=None, ge=1, le=2**50, description="Judge against this instead.")


class SuggestedChange(Response):
    change: str
    overrides: dict[str, Any] = Field(description="The change as overrides; empty where another model is meant.")
    estimate_bytes: int
    verdict: Literal["fits", "tight", "does_not_fit", "unknown"]


class CompatibilityResponse(Response):
    verdict: Literal["fits", "tight", "does_not_fit", "unknown"]
    available_bytes: int | None
    estimate: Estimate | None
    reasons: list[str]
    suggestions: list[SuggestedChange]
    blockers: list[str]


@router.post("/compatibility", dependencies=ASKS_THE_HUB)
async def compatibility(
    body: CompatibilityRequest, service: Annotated[CompatibilityService, Depends(get_compatibility_service)]
) -> CompatibilityResponse:
    """Estimate the peak memory of a fine-tune by component, from the model's config alone, and judge it.

    The estimate is for the engine that would hold the base, which it names. Its `host_bytes` are what Unsloth's
    checkpointing puts into host memory, beside the total, which is the device's.

    What a load would refuse the model for, its licence, code of its own, pickled weights, that the Hub has disabled it,
    is in `blockers`, and the verdict then `unknown`. A setting that cannot take effect is refused as `configure`
    refuses it, a target module that the model does not have among them.
    """
    names = (
        "rank",
        "target_modules",
        "target_experts",
        "max_seq_length",
        "batch_size",
        "gradient_checkpointing",
        "optimizer",
        "precision",
    )
    overrides = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    result = await may_ask_the_hub(
        service.check, body.model_id, body.revision, body.algorithm, overrides, body.device, body.memory_bytes
    )
    return CompatibilityResponse.model_validate(result)
