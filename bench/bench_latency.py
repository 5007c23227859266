"""The latency of GET /api/hardware/profile at 50 requests a second, on a server that is idle and then trains."""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from tests.support.server import CACHE, StudioServer

REQUESTS, INTERVAL_S = 500, 0.02
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def latencies_ms(http: httpx.Client) -> list[float]:
    """Time requests at a fixed rate. The time runs from when a request was due, so a late start counts as waiting."""
    latencies = []
    begin = time.perf_counter()
    for number in range(REQUESTS):
        due = begin + number * INTERVAL_S
        time.sleep(max(0.0, due - time.perf_counter()))
        http.get("/api/hardware/profile").raise_for_status()
        latencies.append((time.perf_counter() - due) * 1000)
    return latencies


def show(name: str, values: list[float]) -> None:
    """Print the median and the 99th percentile."""
    print(f"{name:15} p50 {statistics.median(values):6.1f} ms   p99 {statistics.quantiles(values, n=100)[98]:6.1f} ms")


def main() -> None:
    """Measure idle, busy, idle."""
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(n)))} for n in range(1, 60)]
    environment = {"PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as home, StudioServer(Path(home), os.environ | environment) as studio:
        loaded = studio.load(MODEL_ID)
        dataset = studio.upload("\n".join(map(json.dumps, rows)))
        latencies_ms(studio.http)
        show("idle", latencies_ms(studio.http))
        job = studio.submit(loaded_model_id=loaded["id"], dataset_id=dataset["id"], overrides={"max_steps": 100_000})
        studio.wait_for_step(job["id"], 2)
        show("while training", latencies_ms(studio.http))
        studio.http.post(f"/api/training/jobs/{job['id']}/cancel")
        studio.events(job["id"])
        show("idle again", latencies_ms(studio.http))


if __name__ == "__main__":
    main()
