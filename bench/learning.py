"""The evaluation loss on held-out rows before and after a short run of each algorithm, over HTTP.

    python bench/learning.py --url http://127.0.0.1:8000 --data rows.json --rows 200 --steps 25
    python bench/learning.py --data rows.json --algorithms lora --rates 2e-4 default 1.3e-3

It needs a running server and prints a table. It exits with 1 if the loss of any run does not fall, or if the default
learning rate leaves a higher loss than the first of the given rates.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALGORITHMS = ("lora", "qlora", "dora", "pissa", "rslora")
ENDED = ("succeeded", "failed", "cancelled", "interrupted")


def read(path: Path, rows: int) -> list[dict[str, Any]]:
    """Read the first rows of a JSON or JSONL file."""
    text = path.read_text(encoding="utf-8")
    all_rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return list(all_rows[:rows])


def run(http: httpx.Client, dataset_id: str, algorithm: str, steps: int, length: int, rate: str) -> dict[str, Any]:
    """Train once and return the finished job; the rate `default` is what the service chooses itself."""
    overrides: dict[str, Any] = {"max_steps": steps, "max_seq_length": length, "batch_size": 4}
    if rate != "default":
        overrides["learning_rate"] = float(rate)
    body = {
        "model_id": MODEL_ID,
        "dataset_id": dataset_id,
        "validation_fraction": 0.15,
        "algorithm": algorithm,
        "overrides": overrides,
    }
    job = http.post("/api/training/jobs", json=body).raise_for_status().json()
    while job["state"] not in ENDED:
        time.sleep(1)
        job = http.get(f"/api/training/jobs/{job['id']}").raise_for_status().json()
    return dict(job)


def main() -> int:
    """Run every algorithm on one file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--length", type=int, default=256, help="tokens a row at most")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--rates", nargs="+", default=["default"], help="learning rates, or `default`")
    arguments = parser.parse_args()
    http = httpx.Client(base_url=arguments.url, timeout=120)
    content = json.dumps(read(arguments.data, arguments.rows)).encode()
    dataset = http.post("/api/datasets", files={"file": ("rows.json", content)}).raise_for_status().json()
    print(f"{arguments.data.name}: {dataset['rows']} rows, {arguments.steps} steps")
    print(f"{'algorithm':10} {'rate':>8} {'before':>8} {'after':>8} {'tokens/s':>9}")
    good = [
        compare(http, dataset["id"], algorithm, arguments.steps, arguments.length, arguments.rates)
        for algorithm in arguments.algorithms
    ]
    return 0 if all(good) else 1


def compare(http: httpx.Client, dataset_id: str, algorithm: str, steps: int, length: int, rates: list[str]) -> bool:
    """Train with each rate and print the losses."""
    after: dict[str, float] = {}
    fell = True
    for rate in rates:
        job = run(http, dataset_id, algorithm, steps, length, rate)
        if job["state"] != "succeeded":
            print(f"{algorithm:10} {rate:>8} {job['state']}: {job['error']}")
            fell = False
            continue
        before, after[rate] = job["metrics"]["initial_eval_loss"], job["metrics"]["final_eval_loss"]
        used, speed = job["config"]["learning_rate"], job["progress"]["tokens_per_s"]
        name = f"{used:g}" + ("*" if rate == "default" else "")
        print(f"{algorithm:10} {name:>8} {before:8.4f} {after[rate]:8.4f} {speed:9.0f}", flush=True)
        fell = fell and after[rate] < before
    for model in http.get("/api/peft/loaded-models").json()["models"]:
        http.delete(f"/api/peft/loaded-models/{model['id']}")
    return fell and ("default" not in after or after["default"] <= next(iter(after.values())))


if __name__ == "__main__":
    sys.exit(main())
