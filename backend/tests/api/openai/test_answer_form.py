"""`response_format` and forced calls through the unmodified `openai` package, on a model of random weights."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.support.openai_clients import async_client_of
from tests.support.server import CACHE, StudioServer, start_server
from tests.support.shapes import give_positions
from tests.support.tiny_model import copy_tiny_model

pytestmark = pytest.mark.engine
MODEL_ID = "tests/tools"
ASKED: list[Any] = [{"role": "user", "content": "say 3 twice"}]
_HEAD = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
_TURN = "[{{ m['role'] }}]{{ m['content'] }}"
_CALLS = "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}"
_TAIL = "<|end|>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
# A pattern that compiles, and has more states than an answer may walk through.
COSTLY = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}x$"}}}


class Step(BaseModel):
    colour: Literal["red", "green", "blue"]
    count: int = Field(ge=0, le=9)
    done: bool | None


STEP = Step.model_json_schema() | {"additionalProperties": False}


class Plan(BaseModel):
    steps: list[Step] = Field(max_length=2)


class Now(BaseModel):
    """The time."""

    zone: Literal["utc", "local"]


def tool(name: str, **more: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


def wanted(schema: dict[str, Any], **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | more}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    models = tmp_path_factory.mktemp("models")
    copy_tiny_model(models / MODEL_ID)
    (models / MODEL_ID / "chat_template.jinja").write_text(_HEAD + _TURN + _CALLS + _TAIL)
    give_positions(models / MODEL_ID, 2048, CACHE)
    with start_server(tmp_path_factory.mktemp("home"), models) as server:
        yield server


def chat(client: OpenAI, **more: Any) -> Any:
    sampled = {"temperature": 1.5, "seed": 3, "max_tokens": 200}
    body: dict[str, Any] = {"model": MODEL_ID, "messages": ASKED} | sampled | more
    return client.chat.completions.create(**body)


def test_an_answer_is_parsed_into_a_pydantic_model(client: OpenAI, studio: StudioServer) -> None:
    for seed in (1, 2):
        said = client.chat.completions.parse(
            model=MODEL_ID, messages=ASKED, response_format=Plan, temperature=2, seed=seed, max_tokens=240
        ).choices[0]
        assert isinstance(said.message.parsed, Plan) and said.finish_reason == "stop"

    async def alike() -> Any:
        async with async_client_of(studio) as mine:
            return await mine.chat.completions.parse(
                model=MODEL_ID, messages=ASKED, response_format=Plan, temperature=2, seed=2, max_tokens=240
            )

    assert asyncio.run(alike()).choices[0].message.parsed == said.message.parsed


def test_a_stream_and_several_answers_are_held_to_the_schema(client: OpenAI) -> None:
    form = wanted(STEP, strict=True)
    answers = chat(client, response_format=form, n=3, logprobs=True).choices
    texts = [choice.message.content for choice in answers]
    assert all(Step.model_validate_json(text) for text in texts) and len(set(texts)) > 1
    assert all(token.logprob > -9999 for choice in answers for token in choice.logprobs.content)
    streamed = ["", "", ""]
    for chunk in chat(client, response_format=form, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    with client.chat.completions.stream(model=MODEL_ID, messages=ASKED, response_format=Step, max_tokens=200) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Step)


def test_json_mode_begins_an_object_and_max_tokens_cuts_it(client: OpenAI, studio: StudioServer) -> None:
    said = chat(client, response_format={"type": "json_object"}, max_tokens=12).choices[0]
    assert said.message.content.startswith("{")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL_ID, messages=ASKED, response_format=Plan, max_tokens=4)
    plain, text = chat(client), chat(client, response_format={"type": "text"})
    assert plain.choices[0].message.content == text.choices[0].message.content


def test_the_other_door_has_the_same_field(client: OpenAI, studio: StudioServer) -> None:
    form = wanted(STEP)
    there = chat(client, response_format=form).choices[0].message.content
    loaded = next(m for m in studio.http.get("/api/peft/loaded-models").json()["models"] if m["model_id"] == MODEL_ID)
    url = f"/api/peft/loaded-models/{loaded['id']}/generate"
    body = {"messages": ASKED, "temperature": 1.5, "seed": 3, "max_new_tokens": 200, "response_format": form}
    assert studio.http.post(url, json=body).json()["text"] == there
    prompt = {"prompt": "say", "response_format": form, "max_new_tokens": 200}
    assert Step.model_validate_json(studio.http.post(url, json=prompt).json()["text"])
    refused = studio.http.post(url, json=body | {"response_format": wanted({"type": "object", "not": {}})})
    assert refused.status_code == 422 and refused.json()["errors"][0]["location"] == ["response_format"]


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"response_format": wanted({"type": "object", "not": {}})}, "response_format", "not"),
        ({"response_format": wanted({"type": "objekt"})}, "response_format", "objekt"),
        ({"response_format": wanted({"$ref": "https://example.org/s.json"})}, "response_format", "example.org"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", ""),
        ({"response_format": wanted({}, name="a b")}, "response_format.json_schema.name", ""),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [tool("f")]}, "tool_choice", "g"),
        ({"tool_choice": {"type": "function"}, "tools": [tool("f")]}, "tool_choice", "type"),
        ({"tools": [tool("f", parameters={"not": {}}, strict=True)]}, "tools.0.function.parameters", "not"),
        ({"tools": [tool("f", parameters={"type": "array"})]}, "tools.0.function.parameters", "object"),
        ({"response_format": wanted(COSTLY | {"required": ["a"]}), "temperature": 2}, "response_format", "lexer"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused(client: OpenAI, more: Any, param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **more)
    assert refused.value.param == param and says in refused.value.message, refused.value


def test_a_call_is_forced(client: OpenAI) -> None:
    choices: list[tuple[Any, set[str]]] = [
        ("required", {"f", "g"}),
        ({"type": "function", "function": {"name": "g"}}, {"g"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
            {"f"},
        ),
    ]
    for choice, names in choices:
        said = chat(client, tools=[tool("f"), tool("g")], tool_choice=choice).choices[0]
        calls = said.message.tool_calls
        assert calls and said.message.content is None and said.finish_reason == "tool_calls", said
        assert {call.function.name for call in calls} <= names
        assert all(json.loads(call.function.arguments)["n"] in range(10) for call in calls)
        assert len(calls) == 1 or choice == "required" or choice["type"] == "allowed_tools"
    one = chat(client, tools=[tool("f")], tool_choice="required", parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1
    free = tool("f", parameters={"type": "object", "not": {"required": ["a"]}})  # not strict: any object
    call = chat(client, tools=[free], tool_choice="required", max_tokens=60).choices[0]
    assert call.finish_reason == "length" or call.message.tool_calls


def test_a_strict_tool_is_parsed(client: OpenAI) -> None:
    said = client.chat.completions.parse(
        model=MODEL_ID,
        messages=ASKED,
        tools=[openai.pydantic_function_tool(Now)],
        tool_choice="required",
        max_tokens=200,
        seed=3,
        parallel_tool_calls=False,
    ).choices[0]
    assert said.message.tool_calls and isinstance(said.message.tool_calls[0].function.parsed_arguments, Now)
    free = chat(client, tools=[tool("f", strict=True)], temperature=0, max_tokens=8).choices[0]
    assert free.message.content and not free.message.content.startswith("<tool_call>")  # it may answer with a text


def test_a_call_or_json_by_the_schema(client: OpenAI) -> None:
    kinds = set()
    for seed in range(6):
        said = chat(client, tools=[tool("f")], response_format=wanted(STEP), seed=seed).choices[0]
        if said.message.tool_calls:
            kinds.add("call")
        else:
            kinds.add("json")
            assert Step.model_validate_json(said.message.content)
    assert "json" in kinds
