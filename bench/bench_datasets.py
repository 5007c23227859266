"""The memory of an upload at growing sizes, and rows a second beside `datasets.load_dataset` on the same file.

`python ../bench/bench_datasets.py [MB ...]` from `backend/`; 10 and 100 by default. Each reader is a process of its
own, and they run in turn. Their times leave out the imports. Ours includes work that load_dataset does not do:
validation of each line, normal rows, duplicates, sums, and a flush to the disk.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "backend"
sys.path.insert(0, str(BACKEND))

from tests.support.server import StudioServer

MB = 10**6
ROUNDS = 3
THEIRS = """
import sys, time
import datasets
datasets.disable_progress_bars()
began = time.perf_counter()
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
print(len(rows), time.perf_counter() - began)
"""
OURS = """
import json, sys, time
from services.datasets.intake import IntakeRequest, read_dataset
began = time.perf_counter()
request = IntakeRequest([(sys.argv[1], "a.jsonl")], sys.argv[2], None, {}, False, None, None, 2**40)
print(read_dataset(request, lambda *_: None).rows, time.perf_counter() - began)
"""


def write_rows(path: Path, size_bytes: int) -> None:
    """Write conversations of one to three exchanges, half a kilobyte a row, until the file has that size."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size_bytes:
            turns = []
            for _ in range(chance.randint(1, 3)):
                for role, most in (("user", 25), ("assistant", 60)):
                    turns.append({"role": role, "content": " ".join(chance.choices(words, k=chance.randint(3, most)))})
            file.write(json.dumps({"messages": turns}) + "\n")


def run(program: str, path: Path) -> tuple[int, float, int]:
    """Run a reader; return its rows, its seconds and its peak resident memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path), folder],
            cwd=BACKEND,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(BACKEND)},
        )
        assert process.stdout is not None
        rows, seconds = process.stdout.read().split()
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
    return int(rows), float(seconds), usage.ru_maxrss * 1024


def peak_bytes(pid: int) -> int:
    """Return a process's peak resident memory."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def through_http(path: Path) -> tuple[float, int, int]:
    """Upload the file to a fresh server; return seconds, and the server's peak before and after."""
    with tempfile.TemporaryDirectory() as home, StudioServer(Path(home), {"HF_HUB_OFFLINE": "1"}) as studio:
        small = {"file": ("a.jsonl", b'{"prompt": "p", "completion": "c"}')}
        studio.http.post("/api/datasets", files=small).raise_for_status()
        before = peak_bytes(studio.pid)
        began = time.perf_counter()
        with path.open("rb") as file, httpx.Client(timeout=None) as http:
            url = f"http://127.0.0.1:{studio.port}/api/datasets"
            http.post(url, files={"file": ("a.jsonl", file)}).raise_for_status()
        return time.perf_counter() - began, before, peak_bytes(studio.pid)


def main() -> None:
    """Print a block for each size."""
    for size in [int(word) for word in sys.argv[1:]] or [10, 100]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, size * MB)
            pairs = [(run(OURS, path), run(THEIRS, path)) for _ in range(ROUNDS if size <= 100 else 1)]
            seconds, before, after = through_http(path)
        ours, theirs = (min(pair[side][1] for pair in pairs) for side in (0, 1))
        rows = pairs[0][0][0]
        assert rows == pairs[0][1][0]
        ratio = statistics.median(first[1] / second[1] for first, second in pairs)
        print(f"{size} MB, {rows} rows")
        print(f"  our reader    {rows / ours:9,.0f} rows/s   peak {pairs[0][0][2] / MB:7,.0f} MB")
        print(f"  load_dataset  {rows / theirs:9,.0f} rows/s   peak {pairs[0][1][2] / MB:7,.0f} MB   ratio {ratio:.2f}")
        print(f"  upload        {seconds:9.1f} s   server's peak {before / MB:.0f} → {after / MB:.0f} MB")


if __name__ == "__main__":
    main()
