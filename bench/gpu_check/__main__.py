"""`python -m gpu_check`: prove every method on every engine, print one table, add it to docs/gpu.md.

Exits 1 where a method fails, and 2 where there is no GPU and `--cpu` was not given.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model_shapes import read_shape

from domain.memory.activations import Batch
from domain.memory.unsloth import UnslothHere
from domain.memory.verdict import assess
from domain.peft.algorithms import Algorithm
from gpu_check import BACKEND, ROOT
from gpu_check.plan import DEFAULT_MODELS, Case, cases, task
from gpu_check.report import document, keep_earlier
from gpu_check.shapes import SHAPES, TINY, write_rows
from gpu_check.verdicts import Row, compare, judge
from services.hardware.nvml_probe import GpuReading, NvmlProbe

TASK_LIMIT_S = 3600.0
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth")


def main() -> int:
    """Run the check."""
    arguments = _arguments()
    gpus = [gpu for gpu in NvmlProbe().gpus() if gpu.error is None]
    if not gpus and not arguments.cpu:
        print("No NVIDIA GPU answers. `--cpu` runs the steps that need none.", file=sys.stderr)
        return 2
    models = [TINY] if arguments.cpu else arguments.models
    algorithms = [Algorithm(name) for name in arguments.algorithms]
    rows: list[Row] = []
    peers: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="gpu-check-") as name:
        for model in models:
            folder = Path(name) / model
            checked = _check_model(model, algorithms, folder, arguments)
            rows, peers, left_out = rows + checked[0], peers | checked[1], left_out + checked[2]
            shutil.rmtree(folder)  # the next one's weights need the room
    text = document(_machine(gpus, arguments), rows, peers, left_out, on_cpu=arguments.cpu)
    print(text)
    if arguments.output is not None:
        _write(arguments.output, text, gpus, on_cpu=arguments.cpu)
    failed = any(row.problems for row in rows) or any("error" in trl for trl in peers.values())
    return 1 if failed or not rows else 0


def _write(output: Path, report: str, gpus: list[GpuReading], *, on_cpu: bool) -> None:
    """Write a GPU's report beside those of other cards and days; a CPU's alone."""
    if not on_cpu:
        earlier = output.read_text(encoding="utf-8") if output.is_file() else ""
        report = keep_earlier(earlier, f"{gpus[0].name}, {datetime.now(UTC):%Y-%m-%d}, by `make gpu-check`", report)
    output.write_text(report, encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="a tiny model, and the steps that need no GPU")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=DEFAULT_MODELS)
    parser.add_argument("--algorithms", nargs="+", choices=[a.value for a in Algorithm], default=list(Algorithm))
    parser.add_argument("--all", action="store_true", help="every method on every model, not on the smallest alone")
    parser.add_argument("--length", type=int, default=None, help="tokens a row; 2,048, or 64 on a CPU")
    parser.add_argument("--scratch", type=Path, default=None, help="where weights are written; the system's by default")
    parser.add_argument(
        "--output", type=Path, default=None, help="the report; on a GPU docs/gpu.md, which keeps earlier ones"
    )
    arguments = parser.parse_args()
    if arguments.length is None:
        arguments.length = 64 if arguments.cpu else 2048
    if arguments.output is None and not arguments.cpu:
        arguments.output = ROOT / "docs" / "gpu.md"
    return arguments


def _check_model(
    model: str, algorithms: list[Algorithm], folder: Path, arguments: argparse.Namespace
) -> tuple[list[Row], dict[str, dict[str, Any]], list[str]]:
    """Prove every case of one model."""
    length = arguments.length
    folder.mkdir(parents=True)
    written = {"id": "write", "kind": "write", "model": model, "model_path": str(folder / "models" / model)}
    if "error" in _run([written], folder, "write").get("write", {"error": "the process ended"}):
        return [], {model: {"error": "the model could not be written"}}, []
    # Two rows a step and two tokens a number: as many numbers as fill a row to its last token.
    write_rows(folder / "rows.jsonl", rows=64, numbers=length)
    write_rows(folder / "held_out.jsonl", rows=4, numbers=length // 4)

    def config_of(name: str) -> dict[str, Any]:
        return dict(json.loads((folder / "models" / name / "config.json").read_text(encoding="utf-8")))

    planned, left_out = cases(
        [model], algorithms, on_cpu=arguments.cpu, length=length, everything=arguments.all, config_of=config_of
    )
    device = "cpu" if arguments.cpu else "cuda:0"
    tasks = [
        task(kind, case, folder, device)
        for case in planned
        for kind in ("prove", "merged", *(("peer",) if _has_peer(case) else ()))
    ]
    groups = [tasks] if arguments.cpu else [[item] for item in tasks]
    answers: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        answers |= _run(group, folder, str(number))
    rows = [judge(case, answers, on_cpu=arguments.cpu) for case in planned]
    peers = {
        f"{case.model}-{case.algorithm.value}": answers.get(f"peer:{case.id}", {"error": "the process ended"})
        for case in planned
        if _has_peer(case)
    }
    for row in rows:
        _compare(row, rows, peers)
        row.predicted_bytes = _predicted(row.case, config_of(model), on_gpu=not arguments.cpu)
    return rows, peers, left_out


def _has_peer(case: Case) -> bool:
    """Tell whether TRL runs this case too: once for each method that PEFT itself initialises as we do."""
    return case.engine == "transformers" and case.algorithm in (Algorithm.LORA, Algorithm.QLORA)


def _compare(row: Row, rows: list[Row], peers: dict[str, dict[str, Any]]) -> None:
    case = row.case
    others = [
        other.measured.get("losses")
        for other in rows
        if (other.case.model, other.case.algorithm) == (case.model, case.algorithm) and other.case.engine != case.engine
    ]
    compare(row, "agrees with the other engine", others[0] if others else None)
    # Only the first loss is compared: TRL draws its rows and the adapter's first values in its own order.
    trl = peers.get(f"{case.model}-{case.algorithm.value}", {}).get("losses")
    if trl is None or not row.measured:
        row.checks["agrees with TRL"] = None
        return
    first = Row(case, measured={"losses": row.measured["losses"][:1]})
    compare(first, "agrees with TRL", trl[:1])
    row.checks |= first.checks
    row.problems += first.problems


def _predicted(case: Case, config: dict[str, Any], *, on_gpu: bool) -> int | None:
    batch = Batch(case.config.batch_size, case.config.max_seq_length, masked=True, even=True)  # rows fill the length
    unsloth = UnslothHere() if case.engine == "unsloth" else None
    estimate = assess(read_shape(config), case.config, None, on_gpu=on_gpu, batch=batch, unsloth=unsloth).estimate
    return estimate.total_bytes if estimate is not None else None


def _run(tasks: list[dict[str, Any]], folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Run tasks in a process of their own. A task that ended without an answer is missing from the result."""
    answers, spec, log = (folder / f"{name}-{what}" for what in ("answers.jsonl", "tasks.json", "log.txt"))
    spec.write_text(json.dumps({"tasks": tasks, "answers": str(answers)}), encoding="utf-8")
    print(f"{', '.join(item['id'] for item in tasks)} …", file=sys.stderr, flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), str(BACKEND)]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"),
    }
    with log.open("wb") as output:
        command = [sys.executable, "-m", "gpu_check.worker", str(spec)]
        try:
            code: int | None = subprocess.run(
                command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=TASK_LIMIT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    lines = answers.read_text(encoding="utf-8").splitlines() if answers.is_file() else []
    answered = {answer.pop("id"): answer for answer in map(json.loads, lines)}
    if code != 0 or any("error" in answer for answer in answered.values()):
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        print(f"exit code {code}; the last lines:\n" + "\n".join(tail), file=sys.stderr, flush=True)
    return answered


def _machine(gpus: list[GpuReading], arguments: argparse.Namespace) -> list[str]:
    where = "CPU: " + (platform.processor() or platform.machine())
    if not arguments.cpu:
        gpu = gpus[0]
        where = f"GPU: {gpu.name}, {(gpu.memory_total_bytes or 0) / 2**30:.0f} GiB, capability {gpu.compute_capability}"
    return [where, ", ".join(f"{name} {version(name)}" for name in PACKAGES), f"{arguments.length} tokens a row"]


if __name__ == "__main__":
    sys.exit(main())
