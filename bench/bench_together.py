"""Answers on one base at the same time: tokens a second of 1, 4 and 16, with and without adapters, in one run.

Everything goes over HTTP, in rounds that interleave the cases, so that each ratio has its two sides side by side. "One
after the other" is a server with PEFT_STUDIO_ANSWERS_TOGETHER=1, whose answers wait for each other. A newcomer's first
text is timed while seven others run.

`python bench_together.py [--rounds N] [--tokens N]`
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from engine.guards import hide_broken_torchvision
from tests.support.random_adapter import make_random_adapter
from tests.support.server import CACHE, StudioServer

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS, RANK = 8, 16
QUESTION = "Write a long story about a lighthouse keeper and the sea, with every detail."


def ask(studio: StudioServer, loaded_id: str, adapter_id: str | None, tokens: int, number: int) -> tuple[int, float]:
    """Stream one answer; return its tokens, and the seconds to the first piece of text."""
    body = {
        "messages": [{"role": "user", "content": f"{number}. {QUESTION}"}],
        "max_new_tokens": tokens,
        "temperature": 0,
        "adapter_id": adapter_id,
        "stream": True,
    }
    began, first, done = time.perf_counter(), 0.0, {}
    url = f"/api/peft/loaded-models/{loaded_id}/generate"
    with studio.http.stream("POST", url, json=body, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data:"):
                first = first or time.perf_counter() - began
                done = json.loads(line.removeprefix("data:"))
    return int(done["completion_tokens"]), first


def at_once(studio: StudioServer, loaded_id: str, adapters: Sequence[str | None], tokens: int) -> float:
    """Answer as many questions as there are adapters at the same time; return tokens a second in sum."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(adapters)) as threads:
        asked = [
            threads.submit(ask, studio, loaded_id, adapter, tokens, number) for number, adapter in enumerate(adapters)
        ]
        count = sum(answer.result()[0] for answer in asked)
    return count / (time.perf_counter() - began)


def newcomer_s(studio: StudioServer, loaded_id: str, tokens: int) -> float:
    """Return how long a newcomer waits for its first text while seven others run."""
    started = threading.Event()
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(ask, studio, loaded_id, None, 2 * tokens, number) for number in range(7)]
        started.wait(2.0)  # they are in the middle of their answers
        first = ask(studio, loaded_id, None, 4, 99)[1]
        for other in others:
            other.result()
    return first


def imported(studio: StudioServer, folder: Path, number: int) -> str:
    """Give the server a random adapter."""
    local = studio.http.get("/api/models/local").json()["models"]
    path = next(model["path"] for model in local if model["model_id"] == MODEL_ID)
    make_random_adapter(Path(path), folder, MODEL_ID, RANK, number)
    response = studio.http.post("/api/adapters", json={"path": str(folder)})
    response.raise_for_status()
    return str(response.json()["id"])


def main() -> None:
    """Print the ratios, with their spread over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    hide_broken_torchvision()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        environment = os.environ | {"PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
        with (
            StudioServer(root / "queued", environment | {"PEFT_STUDIO_ANSWERS_TOGETHER": "1"}) as queued,
            StudioServer(root / "studio", environment) as studio,
        ):
            fp32 = {"overrides": {"precision": "fp32"}}
            alone_id, many_id = queued.load(MODEL_ID, **fp32)["id"], studio.load(MODEL_ID, **fp32)["id"]
            names = [imported(studio, root / "studio" / "inbox" / str(number), number) for number in range(ADAPTERS)]
            cases: dict[str, Any] = {
                "1 alone": lambda: at_once(studio, many_id, [None], options.tokens),
                "4 one after the other": lambda: at_once(queued, alone_id, [None] * 4, options.tokens),
                "4 together": lambda: at_once(studio, many_id, [None] * 4, options.tokens),
                "16 together": lambda: at_once(studio, many_id, [None] * 16, options.tokens),
                "16 together, the base and 8 adapters": lambda: at_once(
                    studio, many_id, [*names, *names, None][:16], options.tokens
                ),
                "newcomer's first text, s": lambda: newcomer_s(studio, many_id, options.tokens),
            }
            at_once(queued, alone_id, [None], 2)  # libraries, adapters and the check of the model
            at_once(studio, many_id, [*names, None], 2)
            for _ in range(options.rounds):
                for name, case in cases.items():
                    found.setdefault(name, []).append(case())
                    print(f"{name}: {found[name][-1]:.2f}", flush=True)
    report(found)


def report(found: dict[str, list[float]]) -> None:
    """Print medians, spreads, ratios to the answer alone of the same round, and the goals."""
    goals = {"4 together": 2.5, "16 together": 4.0}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {len(found['1 alone'])} rounds")
    print("| | tokens/s in sum | spread | beside 1 alone | goal |")
    print("|---|---:|---:|---:|---:|")
    for name, values in found.items():
        if name.startswith("newcomer"):
            continue
        ratio = statistics.median(value / alone for value, alone in zip(values, found["1 alone"], strict=True))
        spread = f"{min(values):.1f}-{max(values):.1f}"
        goal = goals.get(name)
        said = "" if goal is None else f"{goal} {'met' if ratio >= goal else 'missed'}"
        print(f"| {name} | {statistics.median(values):.1f} | {spread} | {ratio:.2f} | {said} |")
    waits = found["newcomer's first text, s"]
    print(f"A newcomer's first text beside seven: {statistics.median(waits):.2f} s ({min(waits):.2f}-{max(waits):.2f})")


if __name__ == "__main__":
    main()
