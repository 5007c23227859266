"""The `generate` command."""

import time
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer, set_seed

from domain.protocol import Generate, Token
from engine.base import Base
from engine.channel import Channel
from engine.errors import BadSetting


def cut_at_stop(text: str, stop: list[str]) -> str:
    """Return the text before the first stop string."""
    ends = [at for mark in stop if (at := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text


def unfinished_stop(text: str, stop: list[str]) -> int:
    """Return how many characters at the end of the text may be the beginning of a stop string."""
    return max(
        (size for mark in stop for size in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:size])),
        default=0,
    )


class _EventStreamer(TextStreamer):
    """Sends text as it is finished: whole words, special tokens left out, nothing from a stop string on."""

    def __init__(self, base: Base, command: Generate, channel: Channel) -> None:
        super().__init__(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._command, self._channel = command, channel
        self.text = ""
        self._sent = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        visible = cut_at_stop(self.text, self._command.stop)
        whole = stream_end or len(visible) < len(self.text)
        end = len(visible) if whole else len(visible) - unfinished_stop(visible, self._command.stop)
        if end > self._sent:
            self._channel.emit(Token(request_id=self._command.request_id, text=visible[self._sent : end]))
            self._sent = end


class _Ends(StoppingCriteria):
    """Ends generation when the client asks, or when a stop string has been written."""

    def __init__(self, channel: Channel, command: Generate, streamer: _EventStreamer) -> None:
        self._channel, self._command, self._streamer = channel, command, streamer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        text = self._streamer.text
        stop = self._channel.stop_requested(self._command.request_id)
        stop = stop or len(cut_at_stop(text, self._command.stop)) < len(text)
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def _encode(base: Base, command: Generate) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask of shape (1, T)."""
    if command.messages is not None:
        text = base.tokenizer.apply_chat_template(
            [message.model_dump() for message in command.messages], tokenize=False, add_generation_prompt=True
        )
        encoded = base.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        encoded = base.tokenizer(command.prompt, return_tensors="pt")
    limit = base.backend.longest(base.model)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise BadSetting("the prompt is empty")
    if limit is not None and length + command.max_new_tokens > limit:
        raise BadSetting(
            f"{length} prompt tokens and {command.max_new_tokens} new ones exceed the {limit} it is loaded for"
        )
    return {name: encoded[name].to(base.device) for name in ("input_ids", "attention_mask")}


def generate(base: Base, command: Generate, channel: Channel) -> dict[str, Any]:
    """Generate text; every piece is also sent as a Token event.

    Returns:
        `text`, `prompt_tokens`, `completion_tokens`, `finish_reason` (stop or length), `elapsed_s`.
    """
    inputs = _encode(base, command)
    sampled = command.temperature > 0
    config = GenerationConfig(
        max_new_tokens=command.max_new_tokens,
        do_sample=sampled,
        temperature=command.temperature if sampled else None,
        top_p=command.top_p if sampled else None,
        top_k=0 if sampled else None,
        pad_token_id=base.tokenizer.pad_token_id,
        eos_token_id=base.model.generation_config.eos_token_id or base.tokenizer.eos_token_id,
    )
    if command.seed is not None:
        set_seed(command.seed)
    streamer = _EventStreamer(base, command, channel)
    started = time.monotonic()
    base.backend.begin_answering(base.model)
    with base.using(command.adapter_id), torch.no_grad():
        output = base.model.generate(
            **inputs,
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Ends(channel, command, streamer)]),
        )
    completion = output.shape[1] - inputs["input_ids"].shape[1]
    text = cut_at_stop(streamer.text, command.stop)
    ended = text != streamer.text or int(output[0, -1]) in _as_set(config.eos_token_id)
    return {
        "text": text,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "completion_tokens": completion,
        "finish_reason": "stop" if ended or completion < command.max_new_tokens else "length",
        "elapsed_s": time.monotonic() - started,
    }


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
