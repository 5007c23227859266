"""The check for GPU machines: the steps that a CPU can do, done; and that it fails where something is wrong."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_check.plan import RESUME_AT, STEPS, Case, cases, settings
from gpu_check.report import against_trl, document, keep_earlier
from gpu_check.shapes import OF_EACH_FAMILY, SHAPES
from gpu_check.verdicts import Row, compare, judge
from gpu_check.worker import speed
from gpu_check.workers import OUT_OF_TIME, Workers

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.unsloth_rules import FAST_FAMILIES
from tests.support.server import BACKEND

BENCH = BACKEND.parent / "bench"
CONFIG = configure(
    Algorithm.LORA,
    use_case=None,
    overrides=settings(on_cpu=True, length=64),
    machine=MachineFacts(has_gpu=False, supports_bf16=False),
).config
CASE = Case("tiny", Algorithm.LORA, "transformers", CONFIG)
LOSSES = [5.0 - step / 10 for step in range(STEPS)]
PROVED: dict[str, Any] = {
    "losses": LOSSES,
    "resumed_losses": LOSSES[RESUME_AT:],
    "resumed_from": RESUME_AT,
    "before": 5.0,
    "after": 4.0,
    "tokens_per_s": 200.0,
    "peak_bytes": 2**30,
    "computation": "in some way",
}


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(BENCH), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "gpu_check", *arguments],
        cwd=BACKEND, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.engine
def test_on_a_cpu_it_does_every_step_that_needs_no_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    done = _run("--cpu", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    text = output.read_text()
    for algorithm in Algorithm:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| tiny | {algorithm.value} | tr")][:1]
        assert line.split(" | ")[3:6] == ["yes", "yes", "yes"], line
        assert f"{algorithm.value} on tiny through Unsloth: it needs a CUDA GPU" in text
    assert "Nothing." in text and "NO" not in text


def _judged(changes: dict[str, Any], merged: float = 4.0, *, on_cpu: bool = True) -> Row:
    answers = {f"prove:{CASE.id}": PROVED | changes, f"merged:{CASE.id}": {"after": merged}}
    return judge(CASE, answers, on_cpu=on_cpu)


def test_a_sound_run_passes() -> None:
    row = _judged({})
    assert row.checks == {"trains": True, "resumes": True, "merges": True} and row.problems == []


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"losses": LOSSES[::-1]}, {"trains", "resumes"}),
        ({"losses": [float("nan"), *LOSSES[1:]]}, {"trains"}),
        ({"losses": LOSSES[:-1]}, {"trains", "resumes"}),
        ({"after": 5.5}, {"trains", "merges"}),
        ({"resumed_from": None}, {"resumes"}),
        ({"resumed_losses": [*LOSSES[RESUME_AT:-1], LOSSES[-1] + 1e-6]}, {"resumes"}),
    ],
)
def test_a_run_that_is_not_sound_fails(changes: dict[str, Any], failing: set[str]) -> None:
    row = _judged(changes)
    assert {name for name, good in row.checks.items() if good is False} == failing
    assert len(row.problems) == len(failing)


def test_a_merge_that_says_something_else_fails() -> None:
    assert _judged({}, merged=4.1).checks["merges"] is False


def test_what_gave_no_answer_fails() -> None:
    assert judge(CASE, {}, on_cpu=True).checks == {"trains": False}
    lost = {f"prove:{CASE.id}": {"error": "OutOfMemoryError"}}
    assert "OutOfMemoryError" in judge(CASE, lost, on_cpu=True).problems[0]


def test_what_had_no_time_left_is_not_taken_for_a_failure() -> None:
    answers = {f"prove:{CASE.id}": PROVED, f"merged:{CASE.id}": {"left_out": OUT_OF_TIME}}
    row = judge(CASE, answers, on_cpu=True)
    assert row.checks["merges"] is None and row.problems == []


@pytest.mark.engine
def test_one_task_that_hangs_dies_or_fails_costs_its_process_and_no_other_task(tmp_path: Path) -> None:
    good = {"id": "write", "kind": "write", "model": "tiny", "model_path": str(tmp_path / "tiny")}
    with Workers(tmp_path, task_limit_s=0.01, deadline=None) as hasty:
        assert hasty.do(good)["error"] == "it took longer than 0.01 s"
    with Workers(tmp_path, task_limit_s=250, deadline=None) as workers:
        workers.start("transformers").end()
        killed = workers.start("transformers")
        killed._process.kill()
        assert killed.do(good, 250) == {"error": "the process ended with exit code -9"}
        failed = workers.do({"id": "x", "kind": "unheard of"})
        assert failed["error"] == "KeyError: 'unheard of'" and not killed.alive
        answer = workers.do(good)
        assert "error" not in answer and (tmp_path / "tiny" / "config.json").is_file()


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    with Workers(tmp_path / "never", task_limit_s=1.0, deadline=time.monotonic()) as workers:
        assert workers.do({"id": "x", "kind": "write"}) == {"left_out": OUT_OF_TIME}
    assert not (tmp_path / "never").exists()


def test_a_report_of_a_check_that_is_not_over_says_so() -> None:
    def text(*, over: bool) -> str:
        return document(["a machine"], [_judged({})], {}, [], on_cpu=False, over=over)

    assert "was not over" in text(over=False) and "was not over" not in text(over=True)


def test_engines_that_differ_are_told_apart() -> None:
    row = _judged({}, on_cpu=False)
    compare(row, "agrees with the other engine", [loss * 1.01 for loss in LOSSES])
    assert row.checks["agrees with the other engine"] is True
    compare(row, "agrees with the other engine", [loss * 1.05 for loss in LOSSES])
    assert row.checks["agrees with the other engine"] is False and row.problems
    compare(row, "agrees with TRL", None)
    assert row.checks["agrees with TRL"] is None


TWO_MODELS = ["Llama-3.2-1B", "Qwen2.5-7B"]  # the smallest, on which every method runs, and another


@pytest.mark.engine
def test_on_a_gpu_every_method_goes_to_both_engines() -> None:
    found, left_out = cases(
        TWO_MODELS, list(Algorithm), on_cpu=False, length=2048, everything=True, config_of=SHAPES.__getitem__
    )
    expected = {(model, algorithm, engine) for model in TWO_MODELS for algorithm in Algorithm for engine in
                ("transformers", "unsloth")}  # fmt: skip
    assert {(case.model, case.algorithm, case.engine) for case in found} == expected
    assert left_out == []
    some, rest = cases(
        TWO_MODELS, list(Algorithm), on_cpu=False, length=2048, everything=False, config_of=SHAPES.__getitem__
    )
    assert len(some) + 2 * len(rest) == len(found)  # what is left out is said
    # What people run most comes first, on the engine that they get, and what starts slowest last.
    order = [(case.algorithm, case.engine) for case in some if case.model == "Llama-3.2-1B"]
    assert order[:4] == [
        (Algorithm.QLORA, "unsloth"), (Algorithm.QLORA, "transformers"),
        (Algorithm.LORA, "unsloth"), (Algorithm.LORA, "transformers"),
    ]  # fmt: skip
    assert {algorithm for algorithm, _ in order[-2:]} == {Algorithm.LOFTQ}


def test_the_families_mode_has_one_of_each_that_unsloth_is_fast_for() -> None:
    families = [SHAPES[name]["model_type"] for name in OF_EACH_FAMILY]
    assert sorted(families) == sorted(FAST_FAMILIES)


def test_the_report_has_the_ratios_and_what_failed() -> None:
    row = _judged({"resumed_from": None})
    row.predicted_bytes = 2 * 2**30
    peers = {"tiny-lora": {"tokens_per_s": 100.0, "peak_bytes": 4 * 2**30}}
    text = document(["a machine"], [row], peers, ["something"], on_cpu=False)
    assert "| 0.50 | 200 |" in text and "**NO**" in text and "- tiny-lora-transformers: resumes" in text
    assert against_trl([row], peers)[-1].endswith("| 200 | 2.00 | 1.00 GiB | 0.25 |")


def test_the_warm_up_is_no_part_of_the_speed() -> None:
    assert speed([10] * 5, [100.0, 50.0, 1.0, 2.0, 1.0]) == 10.0


def test_a_report_leaves_those_of_other_cards_and_days() -> None:
    def report(speed: float) -> str:
        return document(["a machine"], [_judged({"tokens_per_s": speed})], {}, [], on_cpu=False)

    both = keep_earlier(keep_earlier("", "card A, 2026-01-01", report(100)), "card B, 2026-01-01", report(200))
    again = keep_earlier(both, "card A, 2026-01-01", report(300))
    assert again.count("## card A, 2026-01-01\n") == again.count("## card B, 2026-01-01\n") == 1
    assert "| 300 |" in again and "| 200 |" in again and "| 100 |" not in again
    assert [line for line in again.splitlines() if line.startswith("# ")] == ["# Measured on GPUs"]
    # What is written by hand stays: an introduction, and the figures of another day.
    kept = (BACKEND.parent / "docs" / "gpu.md").read_text()
    introduction, _, figures = kept.partition("\n## ")
    longer = keep_earlier(kept, "card A, 2026-01-01", report(100))
    assert longer.startswith(introduction) and longer.endswith(figures)
