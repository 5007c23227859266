"""A cached search and a compatibility check beside a bare FastAPI route with the same payload, one by one in turn.

The Hub is the tests' double. The benchmark checks that it gets no request after the first search.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from tests.support.hub_double import HubDouble
from tests.support.server import StudioServer

ROUNDS, REQUESTS = 7, 100
MODELS = 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
TAGS = ["transformers", "safetensors", "llama", "text-generation", "conversational", "en", "license:mit"]
BARE = """
import json, sys
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

class Body(BaseModel):
    model_config = {"extra": "allow"}

app = FastAPI()
payloads = json.load(open(sys.argv[2]))

@app.post("/search")
def search(body: Body):
    return payloads["search"]

@app.post("/compatibility")
def compatibility(body: Body):
    return payloads["compatibility"]

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""
SEARCH = {"limit": MODELS, "query": "model"}
CHECK = {"model_id": "bench/model-0", "algorithm": "qlora", "max_seq_length": 1024}


def fill(hub: HubDouble) -> None:
    """Give the double models as the Hub's lists have them."""
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"weights are not asked for"}
    for number in range(MODELS):
        hub.add_model(
            f"bench/model-{number}",
            files,
            downloads=MODELS - number,
            pipeline_tag="text-generation",
            library_name="transformers",
            tags=TAGS,
            config={"architectures": CONFIG["architectures"], "model_type": "llama"},
            safetensors={"parameters": {"BF16": 10**9}, "total": 10**9},
        )


def p50_ms(http: httpx.Client, path: str, body: dict[str, object]) -> float:
    """Return the median time of a request."""
    times = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        http.post(path, json=body).raise_for_status()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """Print the p50 of each and their ratio: the median over rounds, with its spread."""
    with HubDouble() as hub, tempfile.TemporaryDirectory() as folder:
        fill(hub)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{folder}/hf", "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        with StudioServer(Path(folder) / "home", os.environ | environment) as studio:
            ours = {name: f"/api/models/{name}" for name in ("search", "compatibility")}
            bodies: dict[str, dict[str, object]] = {"search": dict(SEARCH), "compatibility": dict(CHECK)}
            payloads = {name: studio.http.post(path, json=bodies[name]).json() for name, path in ours.items()}
            assert len(payloads["search"]["models"]) == MODELS
            assert all(model["fit"] is not None for model in payloads["search"]["models"])
            asked = hub.requests.total()
            (Path(folder) / "payloads.json").write_text(json.dumps(payloads))
            port = free_port()
            bare = subprocess.Popen([sys.executable, "-c", BARE, str(port), f"{folder}/payloads.json"])
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as other:
                    while True:
                        try:
                            other.post("/search", json={})
                            break
                        except httpx.TransportError:
                            time.sleep(0.05)
                    for name in ours:
                        pairs = [
                            (p50_ms(other, f"/{name}", bodies[name]), p50_ms(studio.http, ours[name], bodies[name]))
                            for _ in range(ROUNDS + 1)
                        ][1:]
                        ratios = sorted(theirs / mine for theirs, mine in pairs)
                        print(
                            f"{name:14} bare {min(p[0] for p in pairs):5.2f} ms, ours {min(p[1] for p in pairs):5.2f} "
                            f"ms (p50), ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}), "
                            f"{len(json.dumps(payloads[name]))} bytes"
                        )
            finally:
                bare.terminate()
                bare.wait()
            print(f"requests to the Hub during {2 * (ROUNDS + 1) * REQUESTS} answers: {hub.requests.total() - asked}")


if __name__ == "__main__":
    main()
