"""Chats and completions through the unmodified `openai` package: what each field does, streams, and hanging up."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.api.test_hanging_up import MOST, change
from tests.support.openai_clients import async_client_of, client_of
from tests.support.rows import messages_jsonl
from tests.support.server import CACHE, StudioServer, start_server, wait_until
from tests.support.shapes import give_positions
from tests.support.tiny_model import TINY_ID, copy_tiny_model

pytestmark = pytest.mark.engine
TOOLS_ID, ENDLESS_ID = "tests/tools", "tests/endless"
ASKED: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say 3 twice"}]
PLACES = 8  # answers that are written or wait
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
NOW: Any = {
    "type": "function",
    "function": {"name": "now", "description": "the time", "parameters": {"type": "object"}},
}
TOOL_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for message in messages %}[{{ message['role'] }}]"
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """A server with three models: one plain, one whose template knows tools, one that never ends an answer."""
    models = tmp_path_factory.mktemp("models")
    for name in (TINY_ID, TOOLS_ID, ENDLESS_ID):
        copy_tiny_model(models / name)
    (models / TOOLS_ID / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    change(models / ENDLESS_ID / "tokenizer_config.json", "eos_token", "pad_token")
    for name in ("config.json", "generation_config.json"):
        change(models / ENDLESS_ID / name, "eos_token_id", "pad_token_id")
    (models / ENDLESS_ID / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    give_positions(models / ENDLESS_ID, 2 * MOST, CACHE)
    with start_server(
        tmp_path_factory.mktemp("home"),
        models,
        PEFT_STUDIO_MODEL_NAMES=f"gpt-4o={TINY_ID}",
        PEFT_STUDIO_ANSWERS_TOGETHER="2",
        PEFT_STUDIO_ANSWERS_WAITING=str(PLACES - 2),
    ) as server:
        yield server


def chat(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": TINY_ID, "messages": ASKED} | GREEDY | more)


def test_an_answer_is_that_of_the_other_door_and_the_model_is_loaded_for_it(
    client: OpenAI, studio: StudioServer
) -> None:
    answer = chat(client, model="gpt-4o")
    assert (answer.object, answer.model, answer.choices[0].index) == ("chat.completion", "gpt-4o", 0)
    (loaded,) = studio.http.get("/api/peft/loaded-models").json()["models"]
    body = {"messages": ASKED, "temperature": 0, "max_new_tokens": 8}
    other = studio.http.post(f"/api/peft/loaded-models/{loaded['id']}/generate", json=body).json()
    assert answer.choices[0].message.content == other["text"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == other["finish_reason"]
    assert answer.usage.to_dict() == {
        "prompt_tokens": other["prompt_tokens"],
        "completion_tokens": other["completion_tokens"],
        "total_tokens": other["prompt_tokens"] + other["completion_tokens"],
    }
    assert studio.http.get("/api/peft/loaded-models").json()["models"][0]["id"] == loaded["id"]


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.choices for chunk in chat(client, stream=True))


def test_the_end_mark_is_on_the_wire(studio: StudioServer) -> None:
    body = {"model": TINY_ID, "messages": ASKED, "stream": True} | GREEDY
    response = studio.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream") and response.headers["x-request-id"]
    assert response.text.endswith("data: [DONE]\n\n")


def test_lengths_stops_and_seeds(client: OpenAI) -> None:
    whole = chat(client, max_tokens=None, max_completion_tokens=6)
    assert whole.usage.completion_tokens <= 6
    text = whole.choices[0].message.content
    assert len(text) > 3, text
    stopped = chat(client, max_tokens=6, stop=text[2:4]).choices[0]
    assert stopped.message.content == text[: text.index(text[2:4])] and stopped.finish_reason == "stop"
    sampled = {"temperature": 2, "top_p": 0.99, "max_tokens": 8}
    first, again, other = (chat(client, **sampled, seed=seed).choices[0].message.content for seed in (1, 1, 2))
    assert first == again != other


def test_several_answers_have_seeds_of_their_own_and_one_prompt(client: OpenAI) -> None:
    answer = chat(client, temperature=2, seed=5, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    one = chat(client, temperature=2, seed=5)
    assert texts[0] == one.choices[0].message.content
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in chat(client, temperature=2, seed=5, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs_are_those_of_the_tokens(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert len(content) in (answer.usage.completion_tokens, answer.usage.completion_tokens - 1)  # without the end mark
    for token in content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == token.top_logprobs[0].logprob and token.token == token.top_logprobs[0].token  # greedy
        values = [other.logprob for other in token.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1.0001
    said = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert said.strip() == answer.choices[0].message.content.strip()
    streamed = [
        token.to_dict()
        for chunk in chat(client, logprobs=True, top_logprobs=4, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == [token.to_dict() for token in content]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    # The distribution is the model's, whatever is sampled from it.
    hot = chat(client, temperature=2, seed=3, logprobs=True, top_logprobs=4).choices[0].logprobs.content[0]
    assert [other.to_dict() for other in hot.top_logprobs] == [other.to_dict() for other in content[0].top_logprobs]


def test_penalties_and_biases_move_tokens(client: OpenAI) -> None:
    first = client.completions.create(model=TINY_ID, prompt="say", temperature=0, max_tokens=24)
    moved = client.completions.create(model=TINY_ID, prompt="say", temperature=0, max_tokens=24, frequency_penalty=2)
    assert first.choices[0].text != moved.choices[0].text
    forced = client.completions.create(model=TINY_ID, prompt="say", temperature=1, max_tokens=3, logit_bias={"40": 100})
    assert len(set(forced.choices[0].text)) == 1 or forced.choices[0].text == forced.choices[0].text[:1] * 3
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=TINY_ID, prompt="say", max_tokens=1, logit_bias={"999999999": 1})


def test_completions_of_texts_and_tokens(client: OpenAI, studio: StudioServer) -> None:
    both = client.completions.create(model=TINY_ID, prompt=["say 3", "say 4"], temperature=0, max_tokens=4, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.object == "text_completion"
    alone = [client.completions.create(model=TINY_ID, prompt=f"say {n}", temperature=0, max_tokens=4) for n in (3, 4)]
    assert [choice.text for choice in both.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    assert both.usage and alone[0].usage and alone[1].usage
    assert both.usage.prompt_tokens == alone[0].usage.prompt_tokens + alone[1].usage.prompt_tokens
    tokens = client.completions.create(model=TINY_ID, prompt=[5, 6, 7], temperature=0, max_tokens=3)
    assert tokens.usage and tokens.usage.prompt_tokens == 3
    pieces = client.completions.create(model=TINY_ID, prompt="say 3", temperature=0, max_tokens=4, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == alone[0].choices[0].text


def test_an_echo_begins_with_the_prompt_and_its_logprobs(client: OpenAI) -> None:
    echoed = client.completions.create(
        model=TINY_ID, prompt="say 3 twice", temperature=0, max_tokens=2, echo=True, logprobs=2
    )
    choice = echoed.choices[0]
    assert choice.text.startswith("say 3 twice") and choice.logprobs and echoed.usage
    assert choice.logprobs.token_logprobs and choice.logprobs.top_logprobs and choice.logprobs.text_offset
    assert choice.logprobs.token_logprobs[0] is None and all(v <= 0 for v in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.token_logprobs) >= echoed.usage.prompt_tokens
    scored = client.completions.create(model=TINY_ID, prompt="say 3 twice", max_tokens=0, echo=True, logprobs=2)
    assert scored.choices[0].text == "say 3 twice" and scored.choices[0].logprobs
    n = echoed.usage.prompt_tokens
    assert scored.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs[:n]


def test_turns_of_tools_go_through_the_template(client: OpenAI) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone": "utc"}'}}
    turns: list[Any] = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "9"},
    ]
    plain = chat(client, model=TOOLS_ID)
    offered = chat(client, model=TOOLS_ID, tools=[NOW])
    called = chat(client, model=TOOLS_ID, tools=[NOW], messages=turns)
    assert plain.usage.prompt_tokens < offered.usage.prompt_tokens < called.usage.prompt_tokens
    assert chat(client, model=TOOLS_ID, tools=[NOW], tool_choice="none").usage == plain.usage
    streamed = list(chat(client, model=TOOLS_ID, tools=[NOW], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == offered.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        chat(client, tools=[NOW])
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "say 3"}, {"type": "text", "text": " twice"}]}
    ]
    assert chat(client, messages=[ASKED[0], *parts]).choices == chat(client).choices


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"top_k": 4}}, "top_k"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"max_tokens": 30_000}, None),
    ],
)
def test_what_has_no_effect_is_refused(client: OpenAI, more: dict[str, Any], param: str | None) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, **more, stream=stream) if "stream_options" not in more else chat(client, **more)
        assert param is None or refused.value.param == param, refused.value


def test_models_are_listed_and_found_by_names_with_a_slash(client: OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert {TINY_ID, TOOLS_ID, "gpt-4o"} <= set(found)
    assert client.models.retrieve(TINY_ID) == found[TINY_ID] and found[TINY_ID].owned_by == "tests"
    for name in ("nobody/nothing", "gpt-5", "ft:a:local::0", "ft:nonsense"):
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve(name)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            chat(client, model=name)
    with pytest.raises(openai.BadRequestError):
        client.models.delete(TINY_ID)


def test_answers_on_one_base_run_together_and_one_that_is_left_gives_its_place(client: OpenAI) -> None:
    endless = {"model": ENDLESS_ID, "max_tokens": MOST // 2, "stream": True}
    with chat(client, **endless) as kept, chat(client, **endless) as left:
        for stream in (kept, left, kept):
            next(stream)
        left.close()
        # Two are written at once here, so this one needs the place of the one that was left.
        assert chat(client, model=ENDLESS_ID, max_tokens=2).choices[0].finish_reason == "length"
        next(kept)


def test_streams_at_the_same_time_are_each_what_it_is_alone(client: OpenAI, studio: StudioServer) -> None:
    asked: list[Any] = [
        {"messages": [{"role": "user", "content": f"say {number} twice"}], "max_tokens": 4 + number}
        for number in range(4)
    ]

    async def stream(mine: Any, more: Any) -> str:
        chunks = await mine.chat.completions.create(model=TINY_ID, temperature=0, stream=True, **more)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def at_once() -> list[str]:
        async with async_client_of(studio) as mine:
            return list(await asyncio.gather(*(stream(mine, more) for more in asked)))

    assert asyncio.run(at_once()) == [chat(client, **more).choices[0].message.content for more in asked]


def test_an_answer_that_nobody_waits_for_is_ended(client: OpenAI, studio: StudioServer) -> None:
    before = studio.log_path.read_text().count("status=499")
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=2, max_retries=0), model=ENDLESS_ID, max_tokens=MOST // 2)
    wait_until(lambda: studio.log_path.read_text().count("status=499") > before)
    assert chat(client, model=ENDLESS_ID, max_tokens=2).choices[0].finish_reason == "length"


def test_the_async_client_streams_and_leaves(studio: StudioServer, client: OpenAI) -> None:
    async def scenario() -> str:
        async with async_client_of(studio) as mine:
            left = await mine.chat.completions.create(model=ENDLESS_ID, messages=ASKED, max_tokens=9000, stream=True)
            async for _ in left:
                break
            await left.close()
            kept = await mine.chat.completions.create(model=TINY_ID, messages=ASKED, stream=True, **GREEDY)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in kept])

    assert asyncio.run(scenario()) == chat(client).choices[0].message.content


def test_the_package_comes_back_after_a_503_and_is_answered_when_there_is_room(
    client: OpenAI, studio: StudioServer
) -> None:
    """All places are taken until both clients have been sent away. Times are only bounded from below."""
    held = chat(client, model=ENDLESS_ID, n=PLACES, max_tokens=MOST, stream=True)
    next(held)
    with pytest.raises(openai.InternalServerError) as busy:
        chat(client.with_options(max_retries=0), model=ENDLESS_ID)
    assert busy.value.status_code == 503 and busy.value.code == "too_many_answers"
    wait_s = int(busy.value.response.headers["retry-after"])
    assert wait_s > 0
    sent_away_s: dict[str, float] = {}
    lock = threading.Lock()

    def note(who: str, response: httpx.Response) -> None:
        with lock:
            if response.status_code != 503 or who in sent_away_s:
                return
            sent_away_s[who] = time.monotonic()
            if len(sent_away_s) == 2:
                held.close()

    async def note_there(response: httpx.Response) -> None:
        note("async", response)

    async def ask_there() -> tuple[Any, float]:
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note_there]})
        async with async_client_of(studio, max_retries=50, http_client=http) as patient:
            answer = await patient.chat.completions.create(model=ENDLESS_ID, messages=ASKED, **GREEDY)
            return answer, time.monotonic()

    http = openai.DefaultHttpxClient(event_hooks={"response": [lambda response: note("sync", response)]})
    with client_of(studio, max_retries=50, http_client=http) as patient, ThreadPoolExecutor() as threads:
        there = threads.submit(lambda: asyncio.run(ask_there()))
        ended = {"sync": (chat(patient, model=ENDLESS_ID), time.monotonic()), "async": there.result()}
    texts = {answer.choices[0].message.content for answer, _ in ended.values()}
    assert texts == {chat(client, model=ENDLESS_ID).choices[0].message.content}
    assert all(ended_s - sent_away_s[who] >= wait_s for who, (_, ended_s) in ended.items())


def test_a_busy_base_is_a_503_with_the_time_to_wait(client: OpenAI, studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl())
    overrides = {"max_steps": 100_000, "max_seq_length": 64, "rank": 4}
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides=overrides)
    studio.wait_for_step(job["id"], 1)
    with pytest.raises(openai.InternalServerError) as busy:
        chat(client.with_options(max_retries=0))
    assert busy.value.status_code == 503 and busy.value.code == "model_busy"
    assert int(busy.value.response.headers["retry-after"]) > 0
    studio.http.post(f"/api/training/jobs/{job['id']}/cancel")
    studio.wait_for_state(job["id"], "cancelled")
    assert chat(client).choices
