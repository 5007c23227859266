"""Answers that are written together are what each of them is alone, however they come and go."""

import inspect
import json
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from transformers import LogitsProcessor, MambaConfig, MambaForCausalLM

from domain.answer_forms import AnswerForm
from domain.peft.algorithms import Algorithm
from domain.protocol import AttachAdapter, DetachAdapter, Done, Failed, Generate, Token
from engine import answer as answers
from engine.answer import Answer
from engine.base import Base
from engine.commands import CommandLoop
from engine.generation import generate
from engine.row_check import NotTogether, row_facts
from engine.together import Together
from tests.engine.test_methods import config_for, load
from tests.support.channel_double import RecordingChannel
from tests.support.random_adapter import make_random_adapter
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 64},
    "narrow": {"r": 2, "lora_alpha": 90, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4, "lora_alpha": 64, "use_dora": True},
    "head": {"r": 4, "lora_alpha": 64, "modules_to_save": ["lm_head"]},
}
NAMES = [None, *ADAPTERS]
SCHEMA: Any = {
    "type": "object",
    "properties": {"n": {"enum": [1, 22]}},
    "required": ["n"],
    "additionalProperties": False,
}


class Script(RecordingChannel):
    """Hands out commands when the engine has looked for them so many times, and stops some after so many looks."""

    def __init__(self, coming: dict[int, list[Any]], stops: dict[str, int] | None = None) -> None:
        super().__init__()
        self._coming, self._stop_at, self._looks = coming, stops or {}, 0

    def waiting_commands(self) -> list[Any]:
        self._looks += 1
        return self._coming.pop(self._looks, [])

    def stop_requested(self, request_id: str) -> bool:
        return request_id in self._stop_at and self._looks >= self._stop_at[request_id]

    @property
    def idle(self) -> bool:
        return not self._coming


class Loop(CommandLoop):
    """A loop that ends when the script has."""

    def __init__(self, base: Base, channel: Script) -> None:
        super().__init__(channel)
        self._base = base
        self.passes: list[int] = []

    def play(self, channel: Script) -> dict[str, list[BaseModel]]:
        """Serve the script; return the events of each request."""
        commands: deque[Any] = deque()
        while not channel.idle or commands:
            commands.extend(channel.waiting_commands())
            if commands and isinstance(commands[0], Generate) and not self._only_alone():
                self._answer(commands)
            if commands:
                self._serve(commands.popleft())
        events: dict[str, list[BaseModel]] = {}
        for event in channel.events:
            events.setdefault(event.request_id, []).append(event)
        return events


def play(base: Base, coming: dict[int, list[Any]], stops: dict[str, int] | None = None) -> dict[str, list[BaseModel]]:
    channel = Script(coming, stops)
    return Loop(base, channel).play(channel)


def asked(name: str, adapter: str | None = None, **changes: Any) -> Generate:
    values: dict[str, Any] = {
        "request_id": name, "messages": None, "prompt": None, "prompt_ids": [5, 9, 7], "adapter_id": adapter,
        "max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": [],
    }  # fmt: skip
    return Generate(**values | changes)


def alone(base: Base, command: Generate) -> dict[str, Any]:
    return _comparable(generate(base, command, Script({})).model_dump(mode="json"))


def result(events: list[BaseModel]) -> dict[str, Any]:
    done = events[-1]
    assert isinstance(done, Done), done
    text = "".join(event.text for event in events if isinstance(event, Token))
    assert text == done.result["text"]
    return _comparable(done.result)


def _comparable(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "elapsed_s"}


@pytest.fixture(scope="module")
def folders(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings_) in enumerate(ADAPTERS.items()):
        make_random_adapter(tiny_path, root / name, TINY_ID, 4, seed, size=0.2, **settings_)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def base(tiny_path: Path, folders: dict[str, Path]) -> Base:
    made = load(tiny_path, config_for(Algorithm.LORA))
    for name, folder in folders.items():
        made.attach(name, folder)
    return made


REQUEST = st.tuples(
    st.sampled_from(NAMES),
    st.lists(st.integers(4, 300), min_size=1, max_size=40),
    st.integers(0, 24),
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(2, 40)),
)


@settings(max_examples=12)
@given(st.lists(REQUEST, min_size=2, max_size=9), st.integers(1, 5))
def test_whoever_comes_and_goes_each_has_its_own_answer(base: Base, requests: list[Any], most: int) -> None:
    coming: dict[int, list[Any]] = {}
    stops, commands = {}, []
    for number, (adapter, ids, tokens, arrival, stop) in enumerate(requests):
        command = asked(
            str(number), adapter, prompt_ids=ids, max_new_tokens=tokens, logprobs=1 if number % 2 else None,
            most_together=most,
        )  # fmt: skip
        commands.append(command)
        coming.setdefault(arrival, []).append(command)
        if stop is not None:
            stops[command.request_id] = stop
    events = play(base, coming, stops)
    for command in commands:
        told = events[command.request_id]
        if command.request_id not in stops:
            assert _rounded(result(told)) == _rounded(alone(base, command))
        elif isinstance(told[-1], Done):  # one that was stopped in the middle
            whole = alone(base, command)
            assert told[-1].result["completion_tokens"] <= whole["completion_tokens"]
            assert whole["text"].startswith(str(told[-1].result["text"]).rstrip("\ufffd"))
        else:
            assert isinstance(told[-1], Failed) and told[-1].error_class == "cancelled"
        assert sum(isinstance(event, Done | Failed) for event in told) == 1


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    rounded: dict[str, Any] = json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 3))
    return rounded


def test_seeds_penalties_and_log_probabilities_do_not_depend_on_the_company(base: Base) -> None:
    drawn: list[Any] = [
        {"temperature": 1.5, "seed": 1, "logprobs": 3},
        {"temperature": 0.8, "seed": 2, "top_p": 0.7, "adapter_id": "plain"},
        {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.7, "logit_bias": {7: 3.0}, "adapter_id": "narrow"},
        {"presence_penalty": 1.0, "echo": True, "logprobs": 2, "adapter_id": "dora"},
        {"temperature": 1.5, "seed": 1, "logprobs": 3, "max_new_tokens": 0, "echo": True},
        {"form": AnswerForm(field="response_format", json_schema=SCHEMA), "temperature": 1.0, "seed": 4, "logprobs": 0},
    ]
    commands = [asked(str(number), **{"max_new_tokens": 12} | more) for number, more in enumerate(drawn)]
    events = play(base, {1: commands[:2], 4: commands[2:]})
    for command in commands:
        assert _rounded(result(events[command.request_id])) == _rounded(alone(base, command))


def test_stop_texts_and_ends_are_each_ones_own(base: Base) -> None:
    whole = alone(base, asked("whole", max_new_tokens=20))["text"]
    commands = [asked("a", max_new_tokens=20, stop=[whole[3:6]]), asked("b", max_new_tokens=20)]
    events = play(base, {1: commands})
    assert result(events["a"])["text"] == whole[: whole.index(whole[3:6])]
    assert result(events["a"])["finish_reason"] == "stop" and result(events["b"])["text"] == whole


class Breaks(LogitsProcessor):  # type: ignore[misc]
    """Fails at the third token."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls == 3:
            raise ValueError("broken")
        return scores


def test_one_that_fails_does_not_harm_the_others(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "Moved", lambda *_: Breaks())
    commands = [
        asked("good"), asked("broken", presence_penalty=1.0), asked("empty", prompt_ids=[]),
        asked("lost", "no such adapter"), asked("late", "plain"),
    ]  # fmt: skip
    events = play(base, {1: commands[:4], 3: commands[4:]})
    for name in ("good", "late"):
        (command,) = [command for command in commands if command.request_id == name]
        assert result(events[name]) == alone(base, command)
    failed = {name: events[name][-1] for name in ("broken", "empty", "lost")}
    assert {name: event.error_class for name, event in failed.items()} == {  # type: ignore[attr-defined]
        "broken": "engine", "empty": "bad_setting", "lost": "bad_setting",
    }  # fmt: skip
    assert len(events["broken"]) <= 3  # two tokens and the error


def test_a_pass_that_fails_costs_the_newest_alone(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = alone(base, asked("old"))
    forward = base.model.get_base_model().forward

    def short_of_memory(*arguments: Any, **named: Any) -> Any:
        if named["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("no room for three")
        return forward(*arguments, **named)

    short_of_memory.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(base.model.get_base_model(), "forward", short_of_memory)
    events = play(base, {1: [asked("old"), asked("older")], 3: [asked("new")]})
    assert result(events["old"]) == result(events["older"]) == whole
    assert isinstance(events["new"][-1], Failed) and events["new"][-1].error_class == "out_of_memory"


def test_adapters_come_and_go_while_others_write(tiny_path: Path, folders: dict[str, Path]) -> None:
    base = load(tiny_path, config_for(Algorithm.LORA))
    whole = alone(base, asked("base", max_new_tokens=30))
    put = {name: AttachAdapter(request_id=f"put {name}", adapter_id=name, path=str(folders[name])) for name in ADAPTERS}
    off = DetachAdapter(request_id="off", adapter_id="plain")
    events = play(
        base,
        {
            1: [asked("base", max_new_tokens=30)],
            3: [put["plain"], asked("one", "plain", max_new_tokens=10)],
            5: [off, asked("gone", "plain"), put["dora"], asked("two", "dora")],
        },
    )
    order = [name for name, told in sorted(events.items(), key=lambda item: item[0]) if isinstance(told[-1], Done)]
    assert order == ["base", "off", "one", "put dora", "put plain", "two"]
    assert isinstance(events["gone"][-1], Failed)
    assert result(events["base"])["text"] == whole["text"] and base.adapters == ["dora"]
    assert result(events["two"]) == alone(base, asked("two", "dora"))
    base.attach("plain", folders["plain"])
    assert result(events["one"]) == alone(base, asked("one", "plain", max_new_tokens=10))


def test_what_does_not_fit_waits_or_is_refused(base: Base) -> None:
    facts = row_facts(base)
    one = facts.token_bytes * 40
    commands = [asked(str(number), max_new_tokens=30, free_bytes=2 * one) for number in range(3)]
    events = play(base, {1: [*commands, asked("large", max_new_tokens=200, free_bytes=2 * one)]})
    for command in commands:
        assert result(events[command.request_id]) == alone(base, command)
    assert isinstance(events["large"][-1], Failed) and events["large"][-1].error_class == "no_room"


class Machine:
    """A clock that only passes of a model move: each takes so long, and more for each token or row.

    Attributes:
        steps: Of the answers that are being written.
    """

    def __init__(self, pass_s: float, token_s: float) -> None:
        self.now_s, self.steps = 0.0, 0
        self._pass_s, self._token_s = pass_s, token_s

    def takes(self, tokens: int) -> float:
        return self._pass_s + self._token_s * tokens

    def slow_down(self, passes: Any) -> None:
        prompt, step = passes.prompt, passes.step

        def slow_prompt(ids: list[int], cache: Any) -> Any:
            self.now_s += self.takes(len(ids))
            return prompt(ids, cache)

        def slow_step(cache: Any, tokens: list[int]) -> Any:
            self.now_s += self.takes(len(tokens))
            self.steps += 1
            return step(cache, tokens)

        passes.prompt, passes.step = slow_prompt, slow_step


@pytest.mark.parametrize("slowness", [1, 10])
@pytest.mark.parametrize(("before", "own", "most"), [([], 30, 1), ([], 90, 3), ([150], 12, 2), ([20] * 3, 20, 4)])
def test_a_newcomer_waits_for_few_steps_of_the_others_however_slow_the_machine_is(
    base: Base, slowness: int, before: list[int], own: int, most: int
) -> None:
    """Its first token, counted in tokens of the others. The costs are those of a small model on one core, or ten times.

    Args:
        before: Tokens of the prompts that came just before.
        own: Tokens of its own prompt.
    """
    machine = Machine(0.056 * slowness, 0.0062 * slowness)
    together = Together(base, row_facts(base), lambda _: nullcontext(), lambda _: None, lambda: machine.now_s)
    machine.slow_down(together._passes)

    def begin(name: str, tokens: int) -> Answer:
        answer = Answer(base, asked(name, prompt_ids=[5] * tokens, max_new_tokens=40), Script({}))
        together.add(answer)
        return answer

    others = [begin(f"other {number}", 4) for number in range(3)]
    while not all(answer.count for answer in others):
        together.advance()
    for number, tokens in enumerate(before):
        begin(f"before {number}", tokens)
    machine.steps, began_s = 0, machine.now_s
    newcomer = begin("newcomer", own)
    while not newcomer.count:
        together.advance()
    assert machine.steps <= most
    alone_s = sum(machine.takes(tokens) for tokens in before) + machine.takes(own)
    assert machine.now_s - began_s <= 2 * alone_s  # the others have the other half


@pytest.fixture
def state_space(tmp_path: Path, tiny_path: Path) -> Iterator[Path]:
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": len(tokenizer)}
    MambaForCausalLM(MambaConfig(**shape, eos_token_id=None, pad_token_id=None)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    yield tmp_path / "mamba"


def test_a_model_that_keeps_a_state_answers_one_after_the_other(state_space: Path) -> None:
    base = load(state_space, config_for(Algorithm.LORA, target_modules=["in_proj"]))
    with pytest.raises(NotTogether):
        row_facts(base)
    events = play(base, {1: [asked("a"), asked("b")]})
    assert result(events["a"]) == result(events["b"]) == alone(base, asked("a"))
