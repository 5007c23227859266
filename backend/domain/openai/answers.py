"""Generated texts as OpenAI's API shows them: completions, chat completions, and the chunks of both."""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from domain.openai.tool_calls import read_tool_calls
from domain.results import Generated, TokenChance, TokenChances


@dataclass(frozen=True)
class Asked:
    """What every part of an answer repeats, and what it is made for.

    Attributes:
        model: As it was sent.
        created: Unix seconds.
        choices_a_prompt: How many answers each prompt has.
        tools: Names of the tools that may be called.
        logprobs: Whether the chances of tokens are told.
    """

    id: str
    model: str
    created: int
    choices_a_prompt: int
    tools: Collection[str] = ()
    logprobs: bool = False


def new_id(prefix: str) -> str:
    """Return an id for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(results: Sequence[Generated], choices_a_prompt: int) -> dict[str, int]:
    """Count tokens as the tokenizer does; a prompt with several answers counts once."""
    prompt = sum(result.prompt_tokens for result in results[::choices_a_prompt])
    completion = sum(result.completion_tokens for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# Chat


def chat_body(asked: Asked, results: Sequence[Generated]) -> dict[str, Any]:
    """Show a whole chat completion."""
    return {
        **_head(asked, "chat.completion"),
        "choices": [_chat_choice(asked, index, result) for index, result in enumerate(results)],
        "usage": usage(results, asked.choices_a_prompt),
    }


def _head(asked: Asked, kind: str) -> dict[str, Any]:
    return {
        "id": asked.id,
        "object": kind,
        "created": asked.created,
        "model": asked.model,
        "system_fingerprint": None,
    }


def _chat_choice(asked: Asked, index: int, result: Generated) -> dict[str, Any]:
    content, calls = _said(asked, result)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": _chat_logprobs(asked, result.chances),
        "finish_reason": _reason(result, calls),
    }


def _said(asked: Asked, result: Generated) -> tuple[str | None, list[dict[str, Any]]]:
    """Return an answer's content, and its calls of tools."""
    if not asked.tools:
        return result.text, []
    text, calls = read_tool_calls(result.text, asked.tools)
    shown = [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]
    return (text or None if calls else result.text), shown


def _reason(result: Generated, calls: Sequence[Any]) -> str:
    """Return why an answer ended: one that was cut short may have calls as well."""
    return "tool_calls" if calls and result.finish_reason == "stop" else result.finish_reason


def _chat_logprobs(asked: Asked, chances: Sequence[TokenChances]) -> dict[str, Any] | None:
    if not asked.logprobs:
        return None
    content = [{**_chance(token), "top_logprobs": [_chance(other) for other in token.top]} for token in chances]
    return {"content": content, "refusal": None}


def _chance(token: TokenChance) -> dict[str, Any]:
    return {"token": token.token, "bytes": token.bytes, "logprob": token.logprob}


def chat_chunk(asked: Asked, index: int, delta: dict[str, Any], chances: Sequence[TokenChances] = ()) -> dict[str, Any]:
    """Show a part of an answer: its role, or a piece of its text."""
    logprobs = _chat_logprobs(asked, chances) if "content" in delta and "role" not in delta else None
    return _chunk(asked, "chat.completion.chunk", {"index": index, "delta": delta, "logprobs": logprobs})


def chat_last_chunks(asked: Asked, index: int, result: Generated) -> list[dict[str, Any]]:
    """Show the end of an answer: why it ended, and before that its calls of tools, which are read off the whole."""
    chunks, reason = [], str(result.finish_reason)
    if asked.tools:
        content, calls = _said(asked, result)
        if content:
            chunks.append(chat_chunk(asked, index, {"content": content}, result.chances))
        if calls:
            deltas = [{"index": place, **call} for place, call in enumerate(calls)]
            chunks.append(chat_chunk(asked, index, {"tool_calls": deltas}))
            reason = _reason(result, calls)
    last = chat_chunk(asked, index, {})
    last["choices"][0]["finish_reason"] = reason
    return [*chunks, last]


def _chunk(asked: Asked, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {**_head(asked, kind), "choices": [{**choice, "finish_reason": None}]}


def usage_chunk(asked: Asked, kind: str, results: Sequence[Generated]) -> dict[str, Any]:
    """Show the last chunk of a stream that is to tell its usage."""
    return {**_head(asked, kind), "choices": [], "usage": usage(results, asked.choices_a_prompt)}


# Completions


def completion_body(asked: Asked, results: Sequence[Generated]) -> dict[str, Any]:
    """Show a whole completion."""
    choices = [
        {
            "index": index,
            "text": result.text,
            "logprobs": _text_logprobs(asked, result.chances, 0),
            "finish_reason": result.finish_reason,
        }
        for index, result in enumerate(results)
    ]
    return {
        **_head(asked, "text_completion"),
        "choices": choices,
        "usage": usage(results, asked.choices_a_prompt),
    }


def completion_chunk(
    asked: Asked, index: int, text: str, chances: Sequence[TokenChances], offset: int, reason: str | None = None
) -> dict[str, Any]:
    """Show a piece of a completion.

    Args:
        offset: Characters of the text before it.
    """
    logprobs = _text_logprobs(asked, chances, offset)
    chunk = _chunk(asked, "text_completion", {"index": index, "text": text, "logprobs": logprobs})
    chunk["choices"][0]["finish_reason"] = reason
    return chunk


def _text_logprobs(asked: Asked, chances: Sequence[TokenChances], offset: int) -> dict[str, Any] | None:
    if not asked.logprobs:
        return None
    offsets = []
    for token in chances:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in chances],
        "token_logprobs": [token.logprob for token in chances],
        "top_logprobs": [{other.token: other.logprob for other in token.top} or None for token in chances],
        "text_offset": offsets,
    }
