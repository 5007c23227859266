"""Evaluation loss on held-out rows before and after a short run of each algorithm, over HTTP.

    python bench/learning.py --url http://127.0.0.1:8000 --data rows.json --rows 200 --steps 25

Needs a running server. Prints a table; exits 1 if the loss of any algorithm does not fall.
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
    found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return list(found[:rows])


def run(http: httpx.Client, dataset_id: str, algorithm: str, steps: int) -> dict[str, Any]:
    """Train once and return the finished job."""
    body = {
        "model_id": MODEL_ID,
        "dataset_id": dataset_id,
        "validation_fraction": 0.15,
        "algorithm": algorithm,
        "overrides": {"max_steps": steps, "max_seq_length": 256, "learning_rate": 3e-4},
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
    arguments = parser.parse_args()
    http = httpx.Client(base_url=arguments.url, timeout=120)
    content = json.dumps(read(arguments.data, arguments.rows)).encode()
    dataset = http.post("/api/datasets", files={"file": ("rows.json", content)}).raise_for_status().json()
    print(f"{arguments.data.name}: {dataset['rows']} rows, {arguments.steps} steps")
    print(f"{'algorithm':10} {'before':>8} {'after':>8} {'tokens/s':>9}")
    fell = True
    for algorithm in ALGORITHMS:
        job = run(http, dataset["id"], algorithm, arguments.steps)
        if job["state"] != "succeeded":
            print(f"{algorithm:10} {job['state']}: {job['error']}")
            fell = False
            continue
        before, after = job["metrics"]["initial_eval_loss"], job["metrics"]["final_eval_loss"]
        print(f"{algorithm:10} {before:8.4f} {after:8.4f} {job['progress']['tokens_per_s']:9.0f}", flush=True)
        fell = fell and after < before
        for model in http.get("/api/peft/loaded-models").json()["models"]:
            http.delete(f"/api/peft/loaded-models/{model['id']}")
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main())
