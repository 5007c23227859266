"""Holds an answer to a form: before each token, the tokens that would leave the form are forbidden.

llguidance walks a grammar along the answer. What a template writes around a call of a tool is a literal of the grammar.
"""

import json
import re

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import LogitsProcessor

from domain.answer_forms import AnswerForm, CallsForm, Schema
from domain.answer_schemas import json_rule, limits, readable
from engine.errors import BadForm
from engine.served_tokenizer import ServedTokenizer
from engine.tool_syntax import ToolSyntax, split_ids

_MOST_CALLS = 16  # a model that cannot stop would call until the context is full
_ID = "/[a-zA-Z0-9]{9}/"  # Mistral's ids
_TEXT = r"/(.|\n)+/"


class FormMask(LogitsProcessor):
    """The form of one answer.

    Args:
        form: What the answer is held to.
        served: The tokenizer of the model.
        prompt_tokens: The tokens before the answer.

    Raises:
        BadForm: This model's texts cannot be held to it.
    """

    def __init__(self, form: AnswerForm, served: ServedTokenizer, prompt_tokens: int) -> None:
        try:
            tokenizer: LLTokenizer = served.constrained
        except ValueError as error:
            raise BadForm(f"answers of this model's tokenizer cannot be held to a form: {error}") from error
        self._matcher = LLMatcher(tokenizer, _grammar(form, served), log_level=0, limits=limits())
        self._vocabulary, self._taken = tokenizer.vocab_size, prompt_tokens
        self._check()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, of shape (1, vocabulary), with minus infinity for what would leave the form.

        Raises:
            BadForm: The form has become too complex to follow.
        """
        self._take(input_ids[0])
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        permitted = np.zeros(scores.shape[-1], dtype=bool)
        known = np.unpackbits(bits, bitorder="little", count=min(self._vocabulary, len(permitted)))
        permitted[: len(known)] = known
        return scores.masked_fill(~torch.from_numpy(permitted).to(scores.device), -torch.inf)

    @property
    def ended(self) -> bool:
        """Whether the answer was complete at the last look."""
        return bool(self._matcher.is_stopped())

    def complete(self, input_ids: torch.Tensor) -> bool:
        """Tell whether nothing may follow any more.

        Args:
            input_ids: The prompt and the answer so far, of shape (1, tokens).
        """
        self._take(input_ids[0])
        return self.ended

    def _take(self, ids: torch.Tensor) -> None:
        new = ids[self._taken :].tolist()
        self._taken = len(ids)
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadForm(f"the answer cannot be held to this form: {readable(self._matcher.get_error())}")


def _grammar(form: AnswerForm, served: ServedTokenizer) -> str:
    """Return the form as a grammar in llguidance's variant of Lark's syntax."""
    rules: dict[str, str] = {}
    if form.json_schema is not None:
        rules["answer"] = json_rule(form.json_schema)
    if form.calls is not None:
        syntax = served.tool_syntax
        if syntax is None:
            why = "the model's chat template writes calls of tools in a form that they cannot be held to"
            raise BadForm(f"{why}; leave tool_choice and strict out, or use a model that writes them as JSON")
        marks, shown = _marks(served)
        rules |= _Calls(syntax, form.calls, marks, shown).rules(with_text="answer" not in rules)
    starts = " | ".join(name for name in ("answer", "calls", "text") if name in rules)
    return "\n".join(["%llguidance {}", f"start: {starts}", *(f"{name}: {body}" for name, body in rules.items())])


def _marks(served: ServedTokenizer) -> tuple[dict[str, int], list[int]]:
    """Return the tokens that a grammar names instead of their text, content → id, and those that are text to a reader.

    llguidance takes an added token of the form `<…>` for one, whether the tokenizer calls it special or not.
    """
    added = served.tokenizer.added_tokens_decoder
    marks = {token.content: id_ for id_, token in added.items() if served.constrained.is_special_token(id_)}
    return marks, [id_ for id_ in marks.values() if not added[id_].special and id_ not in served.ends.ids]


class _Calls:
    """The rules of calls in a template's syntax.

    Args:
        marks: The tokens that are named instead of their text.
        shown: Those of them that may be in a text.
    """

    def __init__(self, syntax: ToolSyntax, form: CallsForm, marks: dict[str, int], shown: list[int]) -> None:
        self._syntax, self._form, self._special = syntax, form, marks
        begins = [id_ for content, id_ in marks.items() if content in syntax.before]
        others = [f"<[{id_}]>" for id_ in shown if id_ not in begins]
        self._text = " | ".join([_TEXT, *others])

    def rules(self, *, with_text: bool) -> dict[str, str]:
        """Return the rule `calls`, and `text` where a text may be answered instead."""
        rules = {f"call_{at}": self._call(tool.name, tool.arguments) for at, tool in enumerate(self._form.tools)}
        call = "(" + " | ".join(rules) + ")"
        more = ""
        if self._form.several and self._syntax.between is not None:
            more = f" ({self._literal(self._syntax.between)} {call}){{0,{_MOST_CALLS - 1}}}"
        rest = f"{call}{more} {self._literal(self._syntax.after)}"
        if self._form.required or not with_text:
            return rules | {"calls": f"{self._literal(self._syntax.before)} {rest}"}
        return rules | self._among_text(self._syntax.before.lstrip(), rest)

    def _call(self, name: str, arguments: Schema) -> str:
        written = json.dumps(name, ensure_ascii=False)[1:-1]
        return f"{self._literal(written + self._syntax.middle)} {json_rule(arguments)}"

    def _among_text(self, before: str, rest: str) -> dict[str, str]:
        """Let a text come before the calls, or instead of them. It cannot begin as they do."""
        marks = [at for content in self._special if (at := before.find(content)) >= 0]
        if marks and min(marks) == 0:  # no text is written with it
            return {"text": f"({self._text})+", "calls": f"({self._text})* {self._literal(before)} {rest}"}
        trigger = re.split(r"[{\[]", before)[0].rstrip()
        if trigger and not marks:
            begun = f"/(.|\\n)*/ {json.dumps(trigger, ensure_ascii=False)}"
            return {
                "BEGUN": begun,
                "begun[lazy]": "BEGUN",
                "text": f"({self._text})+",
                "calls": f"begun {self._literal(before[len(trigger) :])} {rest}",
            }
        first = re.escape(before[:1]).replace("/", r"\/")
        return {"text": rf"/[^\s{first}](.|\n)*/", "calls": f"{self._literal(before)} {rest}"}

    def _literal(self, text: str) -> str:
        """Return a text as a sequence of literals, ids and special tokens."""
        parts = []
        for place, between in enumerate(split_ids(text)):
            parts += [_ID] if place else []
            pattern = "(" + "|".join(map(re.escape, self._special)) + ")" if self._special else r"(?!)"
            for part in re.split(pattern, between):
                if part in self._special:
                    parts.append(f"<[{self._special[part]}]>")
                elif part:
                    parts.append(json.dumps(part, ensure_ascii=False))
        return " ".join(parts) or '""'
