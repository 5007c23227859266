"""`python -m gpu_check`: prove every method on every engine, print one table, add it to docs/gpu.md.

Exits 1 where a method fails, and 2 where there is no GPU and `--cpu` was not given.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model_shapes import read_shape

from domain.memory.activations import Batch
from domain.memory.unsloth import UnslothHere
from domain.memory.verdict import assess
from domain.peft.algorithms import Algorithm
from gpu_check import ROOT
from gpu_check.plan import DEFAULT_MODELS, Case, cases, task
from gpu_check.report import document, keep_earlier
from gpu_check.shapes import OF_EACH_FAMILY, SHAPES, TINY, write_rows
from gpu_check.verdicts import Row, compare, judge
from gpu_check.workers import Workers
from services.hardware.nvml_probe import GpuReading, NvmlProbe

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth")
# A card is often lent by the minute. The CPU's check is a test of the check, and takes the time that it takes.
GPU_MINUTES, GPU_TASK_S, CPU_TASK_S = 8.0, 150.0, 3600.0


@dataclass
class Findings:
    """What has been found so far."""

    rows: list[Row] = field(default_factory=list)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def compared(self) -> list[Row]:
        """Return the rows with the checks that need another engine's curve or TRL's, as far as there are any yet."""
        return [self._compared(row) for row in self.rows]

    def _compared(self, row: Row) -> Row:
        case = row.case
        found = Row(case, dict(row.checks), list(row.problems), row.measured, row.predicted_bytes)
        others = [
            other.measured.get("losses")
            for other in self.rows
            if (other.case.model, other.case.algorithm) == (case.model, case.algorithm)
            and other.case.engine != case.engine
        ]
        compare(found, "agrees with the other engine", others[0] if others else None)
        # Only the first loss is compared: TRL draws its rows and the adapter's first values in its own order.
        trl = self.peers.get(f"{case.model}-{case.algorithm.value}", {}).get("losses")
        compare(found, "agrees with TRL", trl and trl[:1], steps=1)
        return found


def main() -> int:
    """Run the check."""
    began = time.monotonic()
    arguments = _arguments()
    gpus = [gpu for gpu in NvmlProbe().gpus() if gpu.error is None]
    if not gpus and not arguments.cpu:
        print("No NVIDIA GPU answers. `--cpu` runs the steps that need none.", file=sys.stderr)
        return 2
    found = Findings()

    def report(*, over: bool) -> str:
        text = document(
            _machine(gpus, arguments), found.compared(), found.peers, found.left_out, on_cpu=arguments.cpu, over=over
        )
        if arguments.output is not None:
            _write(arguments.output, text, gpus, on_cpu=arguments.cpu)
        return text

    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="gpu-check-") as name:
        deadline = None if arguments.minutes is None else began + 60 * arguments.minutes
        with Workers(Path(name) / "logs", task_limit_s=arguments.task_limit_s, deadline=deadline) as workers:
            for model in [TINY] if arguments.cpu else arguments.models:
                folder = Path(name) / model
                _check_model(model, folder, workers, found, arguments, report)
                shutil.rmtree(folder)  # the next one's weights need the room
    print(report(over=True))
    failed = any(row.problems for row in found.compared()) or any("error" in trl for trl in found.peers.values())
    return 1 if failed or not found.rows else 0


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
    parser.add_argument(
        "--families", action="store_true", help="a model of each family that Unsloth has fast layers for, with qlora"
    )
    parser.add_argument("--all", action="store_true", help="every method on every model, not on the smallest alone")
    parser.add_argument("--length", type=int, default=None, help="tokens a row; 2,048, or 64 on a CPU")
    parser.add_argument("--scratch", type=Path, default=None, help="where weights are written; the system's by default")
    parser.add_argument(
        "--output", type=Path, default=None, help="the report; on a GPU docs/gpu.md, which keeps earlier ones"
    )
    parser.add_argument(
        "--minutes", type=float, default=None, help="begin nothing after so many; 8, or no end on a CPU; 0: no end"
    )
    parser.add_argument("--task-limit-s", type=float, default=None, help="seconds for one run; 150, or 3,600 on a CPU")
    arguments = parser.parse_args()
    if arguments.families:
        arguments.models, arguments.algorithms = list(OF_EACH_FAMILY), [Algorithm.QLORA]
    if arguments.minutes is None and not arguments.cpu:
        arguments.minutes = GPU_MINUTES
    arguments.minutes = arguments.minutes or None
    if arguments.task_limit_s is None:
        arguments.task_limit_s = CPU_TASK_S if arguments.cpu else GPU_TASK_S
    if arguments.length is None:
        arguments.length = 64 if arguments.cpu else 2048
    if arguments.output is None and not arguments.cpu:
        arguments.output = ROOT / "docs" / "gpu.md"
    return arguments


def _check_model(
    model: str,
    folder: Path,
    workers: Workers,
    found: Findings,
    arguments: argparse.Namespace,
    report: Callable[..., str],
) -> None:
    """Prove every case of one model, and write the report after each."""
    length = arguments.length
    folder.mkdir(parents=True)
    if not arguments.cpu:
        workers.start("unsloth")  # its import takes half a minute, which the writing of the model takes too
    written = workers.do(
        {"id": f"write:{model}", "kind": "write", "model": model, "model_path": str(_path(folder, model))}
    )
    if "left_out" in written:
        found.left_out.append(f"{model}: {written['left_out']}")
        return
    if "error" in written:
        found.peers[model] = {"error": f"the model could not be written: {written['error']}"}
        return
    # Two rows a step and two tokens a number: as many numbers as fill a row to its last token.
    write_rows(folder / "rows.jsonl", rows=64, numbers=length)
    write_rows(folder / "held_out.jsonl", rows=4, numbers=length // 4)

    def config_of(name: str) -> dict[str, Any]:
        return dict(json.loads((_path(folder, name) / "config.json").read_text(encoding="utf-8")))

    planned, left_out = cases(
        [model],
        [Algorithm(name) for name in arguments.algorithms],
        on_cpu=arguments.cpu,
        length=length,
        everything=arguments.all,
        config_of=config_of,
    )
    found.left_out += left_out
    for case in planned:
        row = _prove(case, folder, workers, found, on_cpu=arguments.cpu)
        if row is not None:
            row.predicted_bytes = _predicted(case, config_of(model), on_gpu=not arguments.cpu)
            found.rows.append(row)
            report(over=False)


def _path(folder: Path, model: str) -> Path:
    return folder / "models" / model


def _prove(case: Case, folder: Path, workers: Workers, found: Findings, *, on_cpu: bool) -> Row | None:
    """Prove a case, and let TRL do the same work; None where the time was over."""
    device = "cpu" if on_cpu else "cuda:0"
    proved = workers.do(task("prove", case, folder, device))
    if "left_out" in proved:
        found.left_out.append(f"{case.id}: {proved['left_out']}")
        return None
    answers = {f"prove:{case.id}": proved}
    if "error" not in proved:
        answers[f"merged:{case.id}"] = workers.do(task("merged", case, folder, device))
    row = judge(case, answers, on_cpu=on_cpu)
    if _has_peer(case):
        trl = workers.do(task("peer", case, folder, device))
        if "left_out" in trl:
            found.left_out.append(f"TRL on {case.id}: {trl['left_out']}")
        else:
            found.peers[f"{case.model}-{case.algorithm.value}"] = trl
    return row


def _has_peer(case: Case) -> bool:
    """Tell whether TRL runs this case too: once for each method that PEFT itself initialises as we do."""
    return case.engine == "transformers" and case.algorithm in (Algorithm.LORA, Algorithm.QLORA)


def _predicted(case: Case, config: dict[str, Any], *, on_gpu: bool) -> int | None:
    batch = Batch(case.config.batch_size, case.config.max_seq_length, masked=True, even=True)  # rows fill the length
    unsloth = UnslothHere() if case.engine == "unsloth" else None
    estimate = assess(read_shape(config), case.config, None, on_gpu=on_gpu, batch=batch, unsloth=unsloth).estimate
    return estimate.total_bytes if estimate is not None else None


def _machine(gpus: list[GpuReading], arguments: argparse.Namespace) -> list[str]:
    where = "CPU: " + (platform.processor() or platform.machine())
    if not arguments.cpu:
        gpu = gpus[0]
        where = f"GPU: {gpu.name}, {(gpu.memory_total_bytes or 0) / 2**30:.0f} GiB, capability {gpu.compute_capability}"
    return [where, ", ".join(f"{name} {version(name)}" for name in PACKAGES), f"{arguments.length} tokens a row"]


if __name__ == "__main__":
    sys.exit(main())
