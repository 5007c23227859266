"""One base with 1, 2, 4 and 8 adapters in one engine: its resident memory, and the time to load each adapter.

The load alone, without HTTP and the engine's channel, is then compared with PEFT's own loader in the same run.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from engine.guards import hide_broken_torchvision
from tests.support.random_adapter import make_random_adapter
from tests.support.server import CACHE, StudioServer

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS, RANK = 8, 16
MIB = 2**20


def resident_bytes(pid: int) -> int:
    """Memory that a process holds, as the kernel counts it."""
    return int(psutil.Process(pid).memory_info().rss)


def first_token_s(studio: StudioServer, loaded_id: str, adapter_id: str | None) -> float:
    """Time a one-token answer."""
    began = time.perf_counter()
    studio.generate(loaded_id, "Hi", adapter_id, max_new_tokens=1)
    return time.perf_counter() - began


def load_beside_peft(path: Path, folders: list[Path]) -> None:
    """Put adapters on two bases in turn, with the engine's loader and with PEFT's, and print the time of each."""
    from peft import PeftModel

    from domain.configure import MachineFacts, configure
    from domain.peft.algorithms import Algorithm
    from engine.base import Base

    gc.freeze()  # as the engine's process does
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    config = configure(Algorithm.LORA, use_case=None, overrides={}, machine=machine).config
    ours, stock = (Base(path, config, "cpu", "transformers") for _ in range(2))
    ratios, times_s = [], []
    for number, folder in enumerate(folders):
        began = time.perf_counter()
        ours.attach(str(number), folder)
        between = time.perf_counter()
        if number == 0:
            stock.model = PeftModel.from_pretrained(stock.model, str(folder), adapter_name="0", torch_device="cpu")
        else:
            stock.model.load_adapter(str(folder), adapter_name=str(number), torch_device="cpu")
        pair = between - began, time.perf_counter() - between
        print(f"adapter {number + 1}: {pair[0] * 1000:.0f} ms, PEFT's loader {pair[1] * 1000:.0f} ms")
        ratios.append(pair[1] / pair[0])
        times_s.append(pair[0])
    print(
        f"inside the engine: the first adapter in {times_s[0] * 1000:.0f} ms, {ratios[0]:.1f} times as fast as PEFT's"
        f" loader; a further one in {statistics.median(times_s[1:]) * 1000:.0f} ms,"
        f" {statistics.median(ratios[1:]):.1f} times as fast (median of {len(folders) - 1})"
    )


def main() -> None:
    """Put eight adapters on one base, one after the other."""
    hide_broken_torchvision()
    environment = {"PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as home, StudioServer(Path(home), os.environ | environment) as studio:
        loaded = studio.load(MODEL_ID)
        pid, loaded_id = loaded["engine_pid"], loaded["id"]
        local = studio.http.get("/api/models/local").json()["models"]
        path = next(model["path"] for model in local if model["model_id"] == MODEL_ID)
        ids = []
        for number in range(ADAPTERS):
            folder = Path(home) / "inbox" / str(number)
            size = make_random_adapter(Path(path), folder, MODEL_ID, RANK, number)
            response = studio.http.post("/api/adapters", json={"path": str(folder)})
            response.raise_for_status()
            ids.append(response.json()["id"])
        first_token_s(studio, loaded_id, None)  # the first answer pays for what torch sets up once
        bare = resident_bytes(pid)
        print(
            f"base loaded in {loaded['load_s']:.2f} s; an adapter (rank {RANK}, all linear layers): {size // MIB} MiB"
        )
        print(f"{'adapters':>8} {'resident':>10} {'over the base':>14} {'over its file':>14} {'load of the last':>17}")
        print(f"{0:>8} {bare / MIB:>6.0f} MiB")
        for count, adapter_id in enumerate(ids, 1):
            began = time.perf_counter()
            body = {"model_id": MODEL_ID, "adapter_id": adapter_id, "wait_s": 60}
            studio.http.post("/api/peft/load-model", json=body).raise_for_status()
            load_s = time.perf_counter() - began
            now = resident_bytes(pid)
            if count in (1, 2, 4, 8):
                over = (now - bare) / MIB
                print(f"{count:>8} {now / MIB:>6.0f} MiB {over:>10.0f} MiB {over * MIB / (count * size):>13.2f}×"
                      f" {load_s * 1000:>14.0f} ms")  # fmt: skip
        one, eight = loaded["memory"]["measured_bytes"], resident_bytes(pid)
        print(f"one base with eight adapters over eight engines: {eight / (8 * one):.2f}")
        for adapter_id in ids:
            first_token_s(studio, loaded_id, adapter_id)
        same = statistics.median(first_token_s(studio, loaded_id, ids[0]) for _ in range(5))
        switching = statistics.median(first_token_s(studio, loaded_id, ids[n % ADAPTERS]) for n in range(1, 9))
        print(f"a first token: same adapter {same * 1000:.0f} ms, another each time {switching * 1000:.0f} ms")
        shown = studio.http.get(f"/api/peft/loaded-models/{loaded_id}").json()
        studio.http.delete(f"/api/peft/loaded-models/{loaded_id}").raise_for_status()
        load_beside_peft(Path(path), [Path(home) / "inbox" / str(number) for number in range(ADAPTERS)])
        print(json.dumps({"adapters": len(shown["adapters"]), "engine_gone": not psutil.pid_exists(pid)}))


if __name__ == "__main__":
    main()
