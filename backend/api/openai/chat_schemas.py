"""Requests of /v1/chat/completions and /v1/completions. Each field takes effect or is refused with the reason."""

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from api.answer_form import Choice, ResponseFormat, Tool, form_of, refuse
from api.openai.schemas import ModelName, Request
from domain.answer_forms import AnswerForm
from domain.protocol import ChatMessage, ChatTurn, Generate

_MOST_TOKENS = 32_768
StopText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(strict=False)]  # a key of a JSON object, which is always a text
Label = Annotated[str, StringConstraints(max_length=512)]
# What a client may send of these without any effect; and why anything else is refused.
_NO_AUDIO = "there is no audio here"
_NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((None,), _NO_AUDIO),
    "modalities": ((None, ["text"]), _NO_AUDIO),
    "function_call": ((None,), "it is the older form; send tools"),
    "functions": ((None, []), "it is the older form; send tools"),
    "moderation": ((None,), "nothing here judges texts"),
    "prediction": ((None,), "answers are not predicted here"),
    "prompt_cache_options": ((None,), "prompts are not cached between requests"),
    "prompt_cache_retention": ((None,), "prompts are not cached between requests"),
    "reasoning_effort": ((None,), "how long a model reasons is its own decision"),
    "service_tier": ((None, "auto", "default"), "there is one machine, and no tiers"),
    "store": ((None, False), "answers are not kept"),
    "verbosity": ((None,), "ask for a shorter or longer answer in words"),
    "web_search_options": ((None,), "nothing here searches the web"),
    "best_of": ((None, 1), "answers are not ranked here; send n"),
    "suffix": ((None,), "the text between a beginning and an end is not written here"),
}


class StreamOptions(Request):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="Nothing is obfuscated here.")


class Sampling(Request):
    """What both kinds of completions have."""

    model: ModelName
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Label | None = Field(default=None, description="A label; it changes no answer.")

    def check(self) -> None:
        """Refuse what would have no effect.

        Raises:
            OptionNotHere: With the field and the reason.
        """
        for name, (neutral, why) in _NOT_HERE.items():
            value = getattr(self, name, None)
            if not any(value == allowed and type(value) is type(allowed) for allowed in neutral):
                raise refuse(name, why)
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "it has no effect without stream=true")

    def _sampled(self, choice: int) -> dict[str, Any]:
        """Return the settings of one of `n` answers. With a seed, each has a seed of its own."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": (self.seed + choice) % 2**31 if self.seed is not None else None,
            "stop": stop or [],
            "frequency_penalty": self.frequency_penalty or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "logit_bias": self.logit_bias or {},
        }

    @property
    def choices(self) -> int:
        """How many answers a prompt has."""
        return self.n or 1

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class FunctionCall(Request):
    name: str
    arguments: str


class ToolCallRequest(Request):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(Request):
    type: Literal["text"]
    text: str


class Message(Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Label | None = None
    tool_calls: list[ToolCallRequest] | None = None
    tool_call_id: Label | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = Field(default=None, description="Labels; they change no answer.")
    safety_identifier: Label | None = Field(default=None, description="A label; it changes no answer.")
    prompt_cache_key: Label | None = Field(default=None, description="A label; it changes no answer.")
    audio: Any = None
    modalities: Any = None
    function_call: Any = None
    functions: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def check(self) -> None:
        """Refuse what would have no effect.

        Raises:
            OptionNotHere: With the field and the reason.
        """
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refuse("max_tokens", "max_completion_tokens says the same; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "it has no effect without logprobs=true")
        _ = self.form  # it refuses what no answer can be held to

    @cached_property
    def form(self) -> AnswerForm | None:
        """Return what the answer is held to.

        Raises:
            OptionNotHere: It cannot be.
        """
        several = self.parallel_tool_calls is not False
        return form_of(self.response_format, self.offered, self.tool_choice, several=several)

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        return (self.tools or []) if self.tool_choice != "none" else []

    def commands(self, adapter_id: str | None) -> list[Generate]:
        """Return a command for each answer."""
        turns: list[ChatMessage | ChatTurn] = [_turn(message) for message in self.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in self.offered] or None
        most = self.max_completion_tokens or self.max_tokens
        return [
            Generate(
                messages=turns,
                prompt=None,
                adapter_id=adapter_id,
                max_new_tokens=most,
                tools=tools,
                form=self.form,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                **self._sampled(choice),
            )
            for choice in range(self.choices)
        ]


def _turn(message: Message) -> ChatTurn:
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content
    if text is None and not message.tool_calls:
        raise refuse("messages", f"a turn of the role {message.role} has no content")
    calls = [_call(call) for call in message.tool_calls or []]
    return ChatTurn(
        role="system" if message.role == "developer" else message.role,
        content=text or "",
        name=message.name,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
    )


def _call(call: ToolCallRequest) -> dict[str, Any]:
    """Return a call as rows have it: its arguments are no text, and templates write them in their own way."""
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError as error:
        raise refuse("messages.tool_calls", f"the arguments of {call.id} are not JSON: {error}") from error
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


Ids = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1, max_length=1_000_000)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]


class CompletionRequest(Sampling):
    prompt: (
        Prompt
        | Ids
        | Annotated[list[Prompt], Field(min_length=1, max_length=128)]
        | Annotated[list[Ids], Field(min_length=1, max_length=128)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None

    def check(self) -> None:
        """Refuse what would have no effect.

        Raises:
            OptionNotHere: With the field and the reason.
        """
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "0 leaves nothing to answer, but with echo=true")

    def commands(self, adapter_id: str | None) -> list[Generate]:
        """Return a command for each answer of each prompt."""
        sent: Any = self.prompt
        several = isinstance(sent, list) and not isinstance(sent[0], int)
        return [
            Generate(
                messages=None,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_ids=prompt if not isinstance(prompt, str) else None,
                adapter_id=adapter_id,
                max_new_tokens=16 if self.max_tokens is None else self.max_tokens,  # OpenAI's default
                logprobs=self.logprobs,
                echo=bool(self.echo),
                **self._sampled(choice),
            )
            for prompt in (sent if several else [sent])
            for choice in range(self.choices)
        ]
