"""Chats through /v1 beside a bare `model.generate` of the same model: first token, tokens/s, four at once.

The two take turns, so that what else the machine does meets both. The answers are greedy and equally long.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from openai import OpenAI

from engine.guards import hide_broken_torchvision
from tests.support.server import CACHE, StudioServer

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENS, ROUNDS, AT_ONCE = 48, 5, 4
TOPICS = ("a fox that builds a ship", "a lighthouse", "two rivers", "a clock that runs backwards")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CREW = {
    "type": "array",
    "minItems": 20,
    "items": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
}
_SCHEMA = {"type": "object", "properties": {"crew": _CREW}, "required": ["crew"]}
FORM = {"type": "json_schema", "json_schema": {"name": "crew", "schema": _SCHEMA}}


@dataclass(frozen=True)
class Timed:
    """One answer, or several at once. `rate` is new tokens a second behind the first, of all of them together."""

    first_s: float
    rate: float


def asked(topic: str) -> list[Any]:
    """Return a conversation whose answer is long."""
    return [{"role": "user", "content": f"Write a very long story about {topic}."}]


class Clock:
    """A streamer of transformers that notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing more."""


class Bare:
    """The model in this process, with nothing around it.

    Args:
        path: Its folder.
        dtype: As the server holds it.
    """

    def __init__(self, path: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def answer(self, *topics: str) -> Timed:
        """Answer in one batch."""
        clock, render = Clock(), self._tokenizer.apply_chat_template
        began = time.perf_counter()
        texts = [render(asked(topic), tokenize=False, add_generation_prompt=True) for topic in topics]
        inputs = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        # A streamer takes one row alone. Of several, what comes before the first token is left in.
        streamer = {"streamer": clock} if len(topics) == 1 else {}
        settings = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
        with self._torch.no_grad():
            self._model.generate(**inputs, **settings, **streamer)
        ended = time.perf_counter()
        if len(topics) > 1:
            return Timed(ended - began, len(topics) * TOKENS / (ended - began))
        return Timed(clock.times_s[1] - began, (TOKENS - 1) / (ended - clock.times_s[1]))


def chat(client: OpenAI, topic: str, **more: Any) -> Timed:
    """Answer one chat as a stream."""
    began, first = time.perf_counter(), 0.0
    stream = client.chat.completions.create(
        model=MODEL_ID, messages=asked(topic), temperature=0, max_tokens=TOKENS, stream=True,
        stream_options={"include_usage": True}, **more,
    )  # fmt: skip
    count = 0
    for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter()
        count = chunk.usage.completion_tokens if chunk.usage else count
    if count != TOKENS:
        raise RuntimeError(f"{topic}: {count} tokens, not {TOKENS}")
    return Timed(first - began, (count - 1) / (time.perf_counter() - first))


def at_once(client: OpenAI) -> Timed:
    """Answer several chats at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda topic: chat(client, topic), TOPICS))
    return Timed(max(answer.first_s for answer in answers), AT_ONCE * TOKENS / (time.perf_counter() - began))


def main() -> None:
    """Take turns and print the medians and their ratios."""
    hide_broken_torchvision()
    environment = {"PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as home, StudioServer(Path(home), os.environ | environment) as studio:
        loaded = studio.load(MODEL_ID)
        local = studio.http.get("/api/models/local").json()["models"]
        path = next(model["path"] for model in local if model["model_id"] == MODEL_ID)
        bare = Bare(path, _DTYPES[loaded["config"]["precision"]])
        client = OpenAI(base_url=f"http://127.0.0.1:{studio.port}/v1", api_key="not-needed", timeout=600)
        ways: dict[str, Callable[[], Timed]] = {
            "bare generate": lambda: bare.answer(TOPICS[0]),
            "a chat": lambda: chat(client, TOPICS[0]),
            "a chat by a schema": lambda: chat(client, TOPICS[0], response_format=FORM),
            f"bare generate, {AT_ONCE} rows": lambda: bare.answer(*TOPICS),
            f"{AT_ONCE} chats at once": lambda: at_once(client),
        }
        for way in ways.values():
            way()  # the first answer pays for what is set up once
        found: dict[str, list[Timed]] = {name: [] for name in ways}
        for number in range(ROUNDS):
            for name, way in ways.items():
                found[name].append(way())
                print(f"round {number + 1}, {name}: {found[name][-1].rate:.1f} tokens/s", flush=True)
    show(found)


def show(found: dict[str, list[Timed]]) -> None:
    """Print the medians, and the ratios of what was measured in the same round."""
    for name, times in found.items():
        first = statistics.median(time.first_s for time in times)
        print(f"{name:25} {first * 1000:7.0f} ms  {statistics.median(time.rate for time in times):7.1f} tokens/s")
    one, chats, held, rows, several = found.values()

    def ratio(left: list[Timed], right: list[Timed], of: Callable[[Timed], float]) -> float:
        return statistics.median(of(a) / of(b) for a, b in zip(left, right, strict=True))

    print(f"first token, a chat over bare generate: {ratio(chats, one, lambda t: t.first_s):.2f}")
    print(f"tokens/s, a chat over bare generate: {ratio(chats, one, lambda t: t.rate):.2f}")
    print(f"tokens/s, by a schema over free: {ratio(held, chats, lambda t: t.rate):.2f}")
    print(f"tokens/s, {AT_ONCE} chats at once over one: {ratio(several, chats, lambda t: t.rate):.2f}")
    beside = ratio(several, rows, lambda t: t.rate)
    print(f"tokens/s, {AT_ONCE} chats at once over bare generate of {AT_ONCE} rows: {beside:.2f}")


if __name__ == "__main__":
    main()
