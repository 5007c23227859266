"""Answers that are held to a form: whatever a model would rather say, what it says is in the form."""

import json
import re
import time
from typing import Any

import pytest

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")

from tokenizers import AddedToken  # noqa: E402

from domain.answer_forms import ANY_OBJECT, AnswerForm, CallsForm, ToolForm  # noqa: E402
from domain.openai.tool_calls import read_tool_calls  # noqa: E402
from engine.answer_form import FormMask  # noqa: E402
from engine.errors import BadForm  # noqa: E402
from engine.served_tokenizer import ServedTokenizer  # noqa: E402
from tests.domain.test_answer_schemas import BOMBS, of  # noqa: E402
from tests.engine.tokenizer_kinds import KINDS, byte_level  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{% if not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST]{{ m['content'] }}[/INST]{% elif m['tool_calls'] %}[TOOL_CALLS][{% for c in m['tool_calls'] %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": '
    "\"{{ c['id'] }}\"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% else %}{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
LLAMA = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['tool_calls'] %}{% if m['tool_calls'] | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{\"name\": \"{{ m['tool_calls'][0]['function']['name'] }}\", \"parameters\": "
    "{{ m['tool_calls'][0]['function']['arguments'] | tojson }}}{% else %}{{ m['content'] }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IN_XML = HERMES.replace('{"name": "', "<function=").replace('", "arguments": ', ">").replace("}}}\\n", "}}\\n")
SYNTAXES = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}
SCHEMA = of(
    colour={"enum": ["red", "grün", 'a "quoted" one']},
    count={"type": "integer", "minimum": 0, "maximum": 99},
    name={"type": "string", "maxLength": 6},
    tags={"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
)
TOOLS = [
    ToolForm(name="now", arguments=of(zone={"enum": ["utc", "local"]})),
    ToolForm(name="now_there", arguments=of(count={"type": "integer", "minimum": 0, "maximum": 9})),
]


def served(tokenizer: Any, template: str = CHATML, *marks: str) -> ServedTokenizer:
    if marks:
        tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = template
    return ServedTokenizer(tokenizer, adapted=False, said_ends=None)


def said(tokenizer: ServedTokenizer, form: AnswerForm, seed: int, most: int = 600) -> tuple[str, bool]:
    """The text of a model that would say anything, and whether the form was complete before it had said enough."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.tensor([[1, 2, 3]])
    mask, ids = FormMask(form, tokenizer, 3), prompt
    size = len(tokenizer.tokenizer) + 7  # models have more embeddings than tokens
    while ids.shape[1] < most:
        scores = mask(ids, torch.randn(1, size, generator=generator))
        assert torch.isfinite(scores).any()
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        if mask.complete(ids) or int(ids[0, -1]) in tokenizer.ends.ids:
            break
    else:
        return tokenizer.tokenizer.decode(ids[0, 3:].tolist(), skip_special_tokens=True), False
    return tokenizer.tokenizer.decode(ids[0, 3:].tolist(), skip_special_tokens=True), True


@pytest.mark.parametrize("kind", ["llama 2", "byte level"])
def test_what_is_said_is_json_of_the_schema(kind: str) -> None:
    tokenizer = served(KINDS[kind]())
    form = AnswerForm(field="response_format", json_schema=SCHEMA)
    for seed in range(8):
        text, complete = said(tokenizer, form, seed)
        assert complete, text
        value = json.loads(text)
        assert list(value) == ["colour", "count", "name", "tags"] and 0 <= value["count"] <= 99
        assert len(value["name"]) <= 6 and all(isinstance(tag, bool) for tag in value["tags"])


OPEN: dict[str, dict[str, Any]] = {
    "an object": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    "no properties": {"type": "object", "properties": {}},
    "objects within": {
        "type": "object",
        "properties": {"a": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/b"}}},
    }
    | {"$defs": {"b": {"type": "object", "properties": {"type": {"const": 1}}}}},
    "one of two": {"anyOf": [{"type": "object", "properties": {"a": {"const": 1}}}, {"type": "null"}]},
}


@pytest.mark.parametrize("schema", OPEN.values(), ids=OPEN)
def test_properties_that_nobody_declared_are_not_written(schema: dict[str, Any]) -> None:
    tokenizer = served(byte_level())
    for seed in range(6):
        text, complete = said(tokenizer, AnswerForm(field="response_format", json_schema=schema), seed, most=300)
        assert complete and set(re.findall(r'"(\w+)"\s*:', text)) <= {"a", "type"}, text


def test_objects_that_are_joined_stay_open() -> None:
    """Each part would forbid what the other asks for."""
    parts = [{"type": "object", "properties": {name: {"const": 1}}, "required": [name]} for name in "ab"]
    tokenizer = served(byte_level())
    form = AnswerForm(field="response_format", json_schema={"allOf": parts, "maxProperties": 2})
    text, complete = said(tokenizer, form, 0, most=300)
    assert not complete or json.loads(text).keys() >= {"a", "b"}
    known = AnswerForm(
        field="f", json_schema={"type": "object", "properties": {}, "additionalProperties": {"const": 1}}
    )
    assert any(len(said(tokenizer, known, seed)[0]) > 9 for seed in range(9))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"llama 2", "byte level"}))
def test_a_tokenizer_that_is_not_known_is_refused(kind: str) -> None:
    with pytest.raises(BadForm, match="tokenizer"):
        FormMask(AnswerForm(field="response_format", json_schema=SCHEMA), served(KINDS[kind]()), 0)


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("several", [False, True])
def test_forced_calls_are_calls_of_the_tools(name: str, several: bool) -> None:
    tokenizer = served(byte_level(), SYNTAXES[name], "[TOOL_CALLS]", "[INST]", "[/INST]")
    form = AnswerForm(field="tool_choice", calls=CallsForm(tools=TOOLS, required=True, several=several))
    counts = set()
    for seed in range(12):
        text, complete = said(tokenizer, form, seed, most=1500)
        rest, calls = read_tool_calls(text, [tool.name for tool in TOOLS])
        assert complete and not rest and calls, text
        counts.add(len(calls))
        for call in calls:
            arguments = json.loads(call.arguments)
            assert arguments.get("zone") in ("utc", "local") if call.name == "now" else arguments["count"] in range(10)
    assert (max(counts) > 1) == (several and name != "llama"), counts


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_call_that_may_be_made_is_held_to_its_schema(name: str) -> None:
    """A text is free until it begins a call."""
    tokenizer = served(byte_level(), SYNTAXES[name], "[TOOL_CALLS]", "[INST]", "[/INST]")
    form = AnswerForm(field="tools", calls=CallsForm(tools=TOOLS[:1], required=False, several=False))
    syntax = tokenizer.tool_syntax
    assert syntax is not None
    inside = syntax.before.split("{")[0] + "{"
    for before in ("", "" if name == "llama" else "well , "):
        mask = FormMask(form, tokenizer, 0)
        ids = tokenizer.tokenizer(before + inside, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for at in range(ids.shape[1]):  # every token of it is allowed
            scores = mask(ids[:, :at], torch.zeros(1, len(tokenizer.tokenizer)))
            assert scores[0, int(ids[0, at])] == 0, tokenizer.tokenizer.decode(ids[0, : at + 1])
        allowed = torch.isfinite(mask(ids, torch.zeros(1, len(tokenizer.tokenizer)))[0]).nonzero().flatten().tolist()
        assert all('"name": "'.startswith(tokenizer.tokenizer.decode([token])) for token in allowed)
    mask = FormMask(form, tokenizer, 0)
    text = tokenizer.tokenizer("the fox jumps", add_special_tokens=False, return_tensors="pt")["input_ids"]
    free = torch.isfinite(mask(text, torch.zeros(1, len(tokenizer.tokenizer)))[0])
    assert free[tokenizer.ends.ids[0]] and free.sum() > 200


@pytest.mark.parametrize("special", [False, True])
def test_marks_of_calls_that_are_tokens(special: bool) -> None:
    """Qwen's are tokens of their own, and no special ones. Where marks are not shown, one call alone can be read."""
    tokenizer = byte_level()
    marks = ["<tool_call>", "</tool_call>", "<think>"]
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    of_qwen = served(tokenizer, HERMES)
    form = AnswerForm(field="tool_choice", calls=CallsForm(tools=TOOLS, required=True, several=True))
    counts = set()
    for seed in range(8):
        text, complete = said(of_qwen, form, seed, most=1500)
        rest, calls = read_tool_calls(text, [tool.name for tool in TOOLS])
        assert complete and not rest and calls, text
        counts.add(len(calls))
    assert (max(counts) > 1) == (not special)
    auto = AnswerForm(field="tools", calls=CallsForm(tools=TOOLS, required=False, several=True))
    mask, ids = FormMask(auto, of_qwen, 0), tokenizer("well , <tool_call>", return_tensors="pt")["input_ids"]
    for at in range(ids.shape[1]):
        scores = mask(ids[:, :at], torch.zeros(1, len(tokenizer)))
        assert torch.isfinite(scores[0, ids[0, at]])
        assert at == 0 or torch.isfinite(scores[0, tokenizer.convert_tokens_to_ids("<think>")]) == (not special)
    begun = torch.isfinite(mask(ids, torch.zeros(1, len(tokenizer)))[0]).nonzero().flatten().tolist()
    assert tokenizer.decode(begun) == "\n"


def test_a_template_whose_calls_are_no_json_is_refused() -> None:
    assert served(byte_level(), IN_XML).tool_syntax is None and served(byte_level(), CHATML).tool_syntax is None
    form = AnswerForm(field="tool_choice", calls=CallsForm(tools=TOOLS, required=True, several=True))
    with pytest.raises(BadForm, match="tool_choice"):
        FormMask(form, served(byte_level(), IN_XML), 0)


@pytest.mark.parametrize("schema", [*BOMBS.values(), ANY_OBJECT], ids=[*BOMBS, "any object"])
def test_no_form_takes_long(schema: dict[str, Any]) -> None:
    tokenizer = served(byte_level())
    assert tokenizer.constrained.vocab_size
    began = time.process_time()
    try:
        said(tokenizer, AnswerForm(field="response_format", json_schema=schema), 3, most=60)
    except BadForm as error:
        assert len(error.message) < 500
    assert time.process_time() - began < 10


def test_whitespace_ends() -> None:
    """A model that only wants to write spaces writes the value all the same."""
    tokenizer = served(byte_level())
    mask, ids = FormMask(AnswerForm(field="f", json_schema=of(a={"const": 1})), tokenizer, 0), torch.zeros(1, 0).long()
    blank = [i for i in range(len(tokenizer.tokenizer)) if not tokenizer.tokenizer.decode([i]).strip()]
    scores = torch.zeros(1, len(tokenizer.tokenizer))
    scores[0, blank] = 9.0
    while not mask.complete(ids):
        ids = torch.cat([ids, mask(ids, scores).argmax(-1, keepdim=True)], dim=1)
        assert ids.shape[1] < 200
    assert json.loads(tokenizer.tokenizer.decode(ids[0])) == {"a": 1}
