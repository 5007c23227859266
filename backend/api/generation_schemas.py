"""Requests and responses of `generate`."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from api.answer_form import ResponseFormat
from api.peft_schemas import Request, Response
from domain.protocol import ChatMessage


class GenerateRequest(Request):
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=1000)
    prompt: str | None = Field(default=None, min_length=1, max_length=1_000_000)
    adapter_id: str | None = Field(default=None, max_length=64, description="Answer with this adapter; null: the base.")
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    temperature: float = Field(default=0.7, ge=0, le=10, description="0 always takes the likeliest token.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=200)]] = Field(default=[], max_length=16)
    response_format: ResponseFormat | None = None
    stream: bool = Field(default=False, description="Answer with server-sent events: token…, then done or error.")

    @model_validator(mode="after")
    def _one_input(self) -> "GenerateRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("send either messages or prompt")
        return self


class GenerateResponse(Response):
    text: str
    adapter_id: str | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    elapsed_s: float
    chat_template: Literal["model", "adapter", "none: a plain one is used"] | None = Field(
        description="Whose chat template rendered the messages; null for a prompt."
    )
