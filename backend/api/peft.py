"""/api/peft: algorithms, configurations, loaded models, generation."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from api import peft_schemas as schemas
from api.answer_form import form_of
from api.configuring import configured
from api.generation_schemas import GenerateRequest, GenerateResponse
from api.hub_token import ASKS_THE_HUB
from api.peft_views import algorithm_view, loaded_model_view, use_case_view
from api.waiting import may_ask_the_hub, until_done, until_done_or_gone
from core.errors import StudioError
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.use_cases import USE_CASES
from domain.protocol import Generate
from services.adapter_service import AdapterService, get_adapter_service
from services.generation_service import Generation, GenerationService, get_generation_service
from services.peft_service import LoadedModel, LoadRequest, PeftService, get_peft_service
from services.training.initial_adapters import InitialAdapters, get_initial_adapters

router = APIRouter(prefix="/api/peft", tags=["peft"])
Peft = Annotated[PeftService, Depends(get_peft_service)]
Generator = Annotated[GenerationService, Depends(get_generation_service)]
Adapters = Annotated[AdapterService, Depends(get_adapter_service)]
Initial = Annotated[InitialAdapters, Depends(get_initial_adapters)]
_NOT_TOLD = {"chances"}  # under /v1 alone
_CLIENT_GONE = 499  # in the log alone: nginx's status for a request whose client hung up


@router.get("/algorithms")
def algorithms(peft: Peft) -> schemas.AlgorithmList:
    """The methods, their parameters with ranges and defaults, and whether each can be used on this machine."""
    return schemas.AlgorithmList(algorithms=[algorithm_view(SPECS[name], peft) for name in Algorithm])


@router.get("/use-cases")
def use_cases() -> schemas.UseCaseList:
    """What people fine-tune for, and the settings each purpose starts from."""
    return schemas.UseCaseList(use_cases=[use_case_view(case) for case in USE_CASES.values()])


@router.post("/configure", dependencies=ASKS_THE_HUB)
async def configure(body: schemas.ConfigureRequest, peft: Peft, initial_adapters: Initial) -> schemas.ConfigureResponse:
    """A complete configuration, every parameter with its source and reason. Nothing is loaded."""
    return await may_ask_the_hub(configured, body, peft, initial_adapters)


@router.post(
    "/load-model",
    status_code=202,
    responses={200: {"model": schemas.LoadedModelResponse}},
    dependencies=ASKS_THE_HUB,
)
async def load_model(
    body: schemas.LoadModelRequest, response: Response, peft: Peft, generator: Generator, adapters: Adapters
) -> schemas.LoadedModelResponse:
    """Load a base model: 202 while it loads, 200 once it is ready within `wait_s`.

    The same base at the same precision is loaded once, whoever asks; its loaded models share one engine. One that
    nothing has used for `PEFT_STUDIO_IDLE_UNLOAD_S` (30 minutes) is unloaded; where another load or a job would not fit
    otherwise, so is one that nothing has used for `PEFT_STUDIO_MAKE_ROOM_AFTER_S` (a minute), the longest unused first.
    A model that trains, answers or is being exported never is.
    """
    model = await may_ask_the_hub(_start_load, body, peft, adapters)
    if body.adapter_id is not None:
        await asyncio.to_thread(generator.attach_when_ready, model, body.adapter_id)
    if model.base.loading is not None and body.wait_s > 0:
        await until_done(model.base.loading, body.wait_s)
    response.headers["Location"] = f"/api/peft/loaded-models/{model.id}"
    response.status_code = 200 if model.state in ("ready", "busy") else 202
    return loaded_model_view(peft.get(model.id))


def _start_load(body: schemas.LoadModelRequest, peft: PeftService, adapters: AdapterService) -> LoadedModel:
    if body.adapter_id is not None:
        adapters.get(body.adapter_id)
    return peft.load(
        LoadRequest(
            model_id=body.model_id,
            revision=body.revision,
            algorithm=body.algorithm,
            use_case=body.use_case,
            overrides=body.overrides.sent(),
            engine=body.engine,
            device=body.device,
            force=body.force,
            allow_pickle=body.allow_pickle,
        )
    )


@router.get("/loaded-models")
def loaded_models(peft: Peft) -> schemas.LoadedModelList:
    """Every loaded model, oldest first."""
    return schemas.LoadedModelList(models=[loaded_model_view(model) for model in peft.models()])


@router.get("/loaded-models/{loaded_model_id}")
def loaded_model(loaded_model_id: str, peft: Peft) -> schemas.LoadedModelResponse:
    """One loaded model, with the progress of its load."""
    return loaded_model_view(peft.get(loaded_model_id))


@router.delete("/loaded-models/{loaded_model_id}", status_code=204)
def unload(loaded_model_id: str, peft: Peft) -> None:
    """Unload a model. The last one on a base ends its engine; its memory is free when this answers."""
    peft.unload(loaded_model_id)


@router.post("/loaded-models/{loaded_model_id}/generate", response_model=GenerateResponse)
async def generate(loaded_model_id: str, body: GenerateRequest, request: Request, generator: Generator) -> Any:
    """Continue a conversation or a prompt, with an adapter or the bare base. A client that hangs up ends it.

    Answers on one base are written together, each as it is alone. 503 with `Retry-After`: too many wait, or this one's
    tokens do not fit into the memory that is free.
    """
    sent = {name: getattr(body, name) for name in GenerateRequest.model_fields.keys() - {"stream", "response_format"}}
    command = Generate(**sent, form=form_of(body.response_format, [], None, several=True))
    if body.stream:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        generation = await asyncio.to_thread(generator.start, loaded_model_id, command, lambda token: put(token.text))
        generation.future.add_done_callback(lambda _: put(None))
        return _Stream(generation, _events(generation, pieces, body.adapter_id))
    generation = await asyncio.to_thread(generator.start, loaded_model_id, command)
    try:
        if not await until_done_or_gone(generation.future, request.receive):
            return Response(status_code=_CLIENT_GONE)
    finally:
        generation.stop()
    return GenerateResponse(**generation.result().model_dump(exclude=_NOT_TOLD), adapter_id=body.adapter_id)


class _Stream(StreamingResponse):
    """Streams a generation, and ends it with the response: a client may be gone before the first event is asked for."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.stop()


async def _events(
    generation: Generation, pieces: "asyncio.Queue[str | None]", adapter_id: str | None
) -> AsyncIterator[bytes]:
    """Yield token events and one last event."""
    try:
        while (piece := await pieces.get()) is not None:
            yield format_sse_event(data_str=json.dumps({"text": piece}), event="token")
        await until_done(generation.future)
        done = generation.result().model_dump(exclude=_NOT_TOLD) | {"adapter_id": adapter_id}
        yield format_sse_event(data_str=json.dumps(done), event="done")
    except StudioError as error:
        yield format_sse_event(data_str=json.dumps({"type": error.slug, "detail": error.detail}), event="error")
