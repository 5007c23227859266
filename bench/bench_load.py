"""Seconds of POST /api/peft/load-model: a server with engines kept ready and one without, in turn."""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from services.models.embedded import MODEL_ID
from tests.support.server import CACHE, StudioServer, wait_until

ROUNDS = 5


def start(home: Path, most_bytes: str) -> StudioServer:
    """Return a server that keeps engines ready which hold so much."""
    environment = {"PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
    return StudioServer(home, os.environ | environment | {"PEFT_STUDIO_WARM_ENGINE_BYTES": most_bytes})


def is_ready(studio: StudioServer) -> bool:
    """Whether the engine is ready that the load will take."""
    kept = studio.http.get("/api/hardware/usage").json()["warm_engines"]
    engine = studio.http.get("/api/hardware/profile").json()["engine"]["name"]
    return any((one["engine"], one["state"]) == (engine, "ready") for one in kept)


def load_s(studio: StudioServer) -> float:
    """Load the embedded model, unload it, and return the seconds of the first."""
    started = time.perf_counter()
    loaded = studio.load(MODEL_ID)
    elapsed = time.perf_counter() - started
    studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}").raise_for_status()
    return elapsed


def main() -> None:
    """Print the medians and the median ratio. The first load of each, which reads the files first, is not counted."""
    with tempfile.TemporaryDirectory() as scratch:
        homes = Path(scratch)
        with start(homes / "warm", str(4 * 2**30)) as warm, start(homes / "cold", "0") as cold:
            pairs = []
            for round_ in range(ROUNDS + 1):
                wait_until(lambda: is_ready(warm), 300)
                pair = load_s(warm), load_s(cold)
                if round_:
                    pairs.append(pair)
    ratio = statistics.median(with_ / without for with_, without in pairs)
    print(
        f"load-model, {MODEL_ID}: kept ready {statistics.median(pair[0] for pair in pairs):.2f} s, "
        f"started for it {statistics.median(pair[1] for pair in pairs):.2f} s, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
