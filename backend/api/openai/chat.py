"""/v1/chat/completions and /v1/completions: answers of bases and fine-tuned models, loaded when they are asked for."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from api.hub_token import ASKS_THE_HUB
from api.openai.chat_schemas import ChatRequest, CompletionRequest
from api.problems import status_of
from api.waiting import may_ask_the_hub, until_done, until_done_or_gone
from core.errors import StudioError
from domain.openai import answers
from domain.openai.answers import Asked
from domain.openai.errors import openai_error
from domain.protocol import Generate, Token
from domain.results import Generated
from services.generation_service import Generation, GenerationService, get_generation_service
from services.peft_service import LoadedModel
from services.served_model_service import ServedModelService, get_served_model_service

router = APIRouter(tags=["openai"])
Models = Annotated[ServedModelService, Depends(get_served_model_service)]
Generator = Annotated[GenerationService, Depends(get_generation_service)]
_CLIENT_GONE = 499  # in the log alone: nginx's status for a request whose client hung up
_DONE = "[DONE]"
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer, or its chunks."}
}


@router.post("/chat/completions", dependencies=ASKS_THE_HUB, responses=_STREAMED, response_model=None)
async def chat(body: ChatRequest, request: Request, models: Models, generator: Generator) -> Response:
    """Answer a conversation. With `stream`, the answer comes in chunks; a client that hangs up ends it."""
    body.check()
    tools = [tool.function.name for tool in body.offered]
    asked = _asked(body, "chatcmpl", tools=tools, logprobs=bool(body.logprobs))
    return await _answer(body, asked, _Chat(asked), request, models, generator)


@router.post("/completions", dependencies=ASKS_THE_HUB, responses=_STREAMED, response_model=None)
async def complete(body: CompletionRequest, request: Request, models: Models, generator: Generator) -> Response:
    """Continue texts or tokens. With `stream`, the answer comes in chunks; a client that hangs up ends it."""
    body.check()
    asked = _asked(body, "cmpl", logprobs=body.logprobs is not None)
    return await _answer(body, asked, _Text(asked), request, models, generator)


def _asked(body: ChatRequest | CompletionRequest, prefix: str, **more: Any) -> Asked:
    return Asked(answers.new_id(prefix), body.model, int(time.time()), body.choices, **more)


class _Chat:
    """How a chat is shown."""

    kind = "chat.completion.chunk"

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._begun: set[int] = set()

    def body(self, results: list[Generated]) -> dict[str, Any]:
        """Show the whole."""
        return answers.chat_body(self._asked, results)

    def piece(self, index: int, token: Token) -> list[dict[str, Any]]:
        """Show a piece. With tools it is held back: only the whole tells whether it is a call."""
        held = bool(self._asked.tools)
        return [*self._role(index), *([] if held else [self._content(index, token)])]

    def _content(self, index: int, token: Token) -> dict[str, Any]:
        return answers.chat_chunk(self._asked, index, {"content": token.text}, token.chances)

    def _role(self, index: int) -> list[dict[str, Any]]:
        """Show the role, once for each answer."""
        if index in self._begun:
            return []
        self._begun.add(index)
        return [answers.chat_chunk(self._asked, index, {"role": "assistant", "content": "", "refusal": None})]

    def last(self, index: int, result: Generated) -> list[dict[str, Any]]:
        """Show the end."""
        return [*self._role(index), *answers.chat_last_chunks(self._asked, index, result)]


class _Text:
    """How a completion is shown."""

    kind = "text_completion"

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._sent: dict[int, int] = {}

    def body(self, results: list[Generated]) -> dict[str, Any]:
        """Show the whole."""
        return answers.completion_body(self._asked, results)

    def piece(self, index: int, token: Token) -> list[dict[str, Any]]:
        """Show a piece."""
        offset = self._sent.get(index, 0)
        self._sent[index] = offset + len(token.text)
        return [answers.completion_chunk(self._asked, index, token.text, token.chances, offset)]

    def last(self, index: int, result: Generated) -> list[dict[str, Any]]:
        """Show the end."""
        return [answers.completion_chunk(self._asked, index, "", [], self._sent.get(index, 0), result.finish_reason)]


@dataclass
class _UnderWay:
    """The answers of a request while they are generated.

    Attributes:
        pieces: What comes of them, as (answer, piece); None for a piece is its end.
        first: Done with the first of these.
    """

    pieces: "asyncio.Queue[tuple[int, Token | None]]" = field(default_factory=asyncio.Queue)
    first: "Future[None]" = field(default_factory=Future)
    generations: list[Generation] = field(default_factory=list)

    def stop(self) -> None:
        """End them all, since nobody listens any more."""
        for generation in self.generations:
            generation.stop()


async def _answer(
    body: ChatRequest | CompletionRequest,
    asked: Asked,
    shown: _Chat | _Text,
    request: Request,
    models: ServedModelService,
    generator: GenerationService,
) -> Response:
    loaded, adapter_id = await may_ask_the_hub(lambda: models.ready(models.find(body.model)))
    under_way = _UnderWay()
    streamed = False
    try:
        await _begin(under_way, generator, loaded, body.commands(adapter_id))
        if body.stream:
            if not await until_done_or_gone(under_way.first, request.receive):
                return Response(status_code=_CLIENT_GONE)
            _raise_early(under_way)
            streamed = True
            return _Stream(under_way, _events(under_way, asked, shown, tells_usage=body.tells_usage))
        for generation in under_way.generations:
            if not await until_done_or_gone(generation.future, request.receive):
                return Response(status_code=_CLIENT_GONE)
        results = [generation.result() for generation in under_way.generations]
        return Response(json.dumps(shown.body(results)), media_type="application/json")
    finally:
        if not streamed:
            under_way.stop()


async def _begin(
    under_way: _UnderWay, generator: GenerationService, loaded: LoadedModel, commands: list[Generate]
) -> None:
    """Start an answer for each command. The engine writes them together, as far as it has room."""
    loop = asyncio.get_running_loop()

    def put(index: int, token: Token | None) -> None:
        under_way.pieces.put_nowait((index, token))
        if not under_way.first.done():
            under_way.first.set_result(None)

    def tell(index: int, token: Token | None) -> None:
        loop.call_soon_threadsafe(put, index, token)

    for index, command in enumerate(commands):
        generation = await asyncio.to_thread(generator.start, loaded.id, command, partial(tell, index))
        under_way.generations.append(generation)
        generation.future.add_done_callback(partial(_tell_end, tell, index))


def _tell_end(tell: Callable[[int, Token | None], None], index: int, _future: "Future[Generated]") -> None:
    tell(index, None)


def _raise_early(under_way: _UnderWay) -> None:
    """Raise the error of an answer that has failed before its first piece: it can still have a status."""
    for generation in under_way.generations:
        if generation.future.done() and generation.future.exception() is not None:
            generation.result()


class _Stream(StreamingResponse):
    """Streams answers, and ends them with the response: a client may be gone before the first event is asked for."""

    def __init__(self, under_way: _UnderWay, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._under_way = under_way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._under_way.stop()


async def _events(
    under_way: _UnderWay, asked: Asked, shown: _Chat | _Text, *, tells_usage: bool
) -> AsyncIterator[bytes]:
    """Yield chunks as they come, the usage if it is asked for, and the end mark."""
    without_usage = {"usage": None} if tells_usage else {}
    try:
        open_answers = len(under_way.generations)
        while open_answers:
            index, token = await under_way.pieces.get()
            if token is None:
                open_answers -= 1
                await until_done(under_way.generations[index].future)
                chunks = shown.last(index, under_way.generations[index].result())
            else:
                chunks = shown.piece(index, token)
            for chunk in chunks:
                yield _event(chunk | without_usage)
        if tells_usage:
            results = [generation.result() for generation in under_way.generations]
            yield _event(answers.usage_chunk(asked, shown.kind, results))
        yield format_sse_event(data_str=_DONE)
    except StudioError as error:
        said = openai_error("/v1", error.slug, status_of(error), error.detail, error.extras)
        yield _event(said.body)


def _event(data: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False))
