"""Engines on tcmalloc beside engines on glibc's: peak resident memory and seconds a step, in turn.

    python bench/bench_allocator.py [--rounds N]

Each run is a fresh engine that trains six steps of SmolLM2-135M-Instruct. The ratios, tcmalloc's over glibc's, are
medians over the rounds. It exits with 1 if tcmalloc's peak is not lower everywhere. A round takes some minutes.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "backend"), str(ROOT / "bench")]

from memory_points import Point, measure, use_allocator

from services.models.embedded import EmbeddedModel

POINTS = (
    Point("lora", 128, 4, 16),
    Point("lora", 512, 1, 16, checkpointing=True),
    Point("qlora", 128, 2, 16),
    Point("dora", 64, 1, 16),
)
STEPS, MIB = 6, 2**20


def run(point: Point, model: Path, name: str) -> tuple[int, float]:
    """Return the peak in bytes and the fastest step in seconds."""
    use_allocator(name)
    measured = measure(point, model, STEPS)
    return measured["peak_bytes"], measured["step_s"]


def main(rounds: int) -> int:
    """Measure every point with both allocators."""
    if not use_allocator("tcmalloc"):
        print("nothing measured: tcmalloc is not installed here")
        return 0
    lower = True
    with tempfile.TemporaryDirectory() as logs:
        model = EmbeddedModel(ROOT / ".cache", Path(logs)).prepare(lambda stage, fraction: None)
        for point in POINTS:
            pairs = []
            for number in range(rounds):
                names = ("glibc", "tcmalloc") if number % 2 == 0 else ("tcmalloc", "glibc")
                measured = {name: run(point, model, name) for name in names}
                pairs.append((measured["glibc"], measured["tcmalloc"]))
            peak, step = (statistics.median(tcmalloc[i] / glibc[i] for glibc, tcmalloc in pairs) for i in (0, 1))
            shown = ", ".join(f"{glibc[0] / MIB:,.0f} -> {tcmalloc[0] / MIB:,.0f}" for glibc, tcmalloc in pairs)
            lower &= peak < 1
            what = f"{point.algorithm}, {point.batch} x {point.length}{', checkpointing' * point.checkpointing}"
            print(f"{what}: peak x {peak:.2f} ({shown} MiB), seconds a step x {step:.2f}", flush=True)
    return 0 if lower else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    sys.exit(main(parser.parse_args().rounds))
