"""Every setting that is sent over HTTP takes effect at the end of the chain: one check a setting.

A run is compared with what a user can see of it (the adapter's files, metrics, events, checkpoints), with the engine's
account of what it built, and with a replay by hand of the same data and settings (tests/replay.py).
"""

import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import replay
import torch
from drawn_settings import LLAMA_LINEARS, MANY_STEPS_MINUTES, requests
from hypothesis import HealthCheck, Phase, given, settings
from replay import Replay, Tokens
from safetensors.torch import load, load_file
from server import StudioServer
from tiny_model import TINY_ID

from domain.algorithms import Algorithm
from domain.peft_config import PARAMETER_NAMES

pytestmark = pytest.mark.engine


def conversations(count: int, start: int) -> list[list[dict[str, str]]]:
    """Conversations of one or two answers and of many lengths, all different."""
    found = []
    for number in range(start, start + count):
        turns = []
        for turn in range(1 + number % 2):
            turns += [
                {"role": "user", "content": f"{number} " + "say " * (number % 5)},
                {"role": "assistant", "content": f"{number + turn} is " + "quick " * ((number * 7) % 11)},
            ]
        found.append(turns)
    return found


TRAINING, VALIDATION = conversations(18, 0), conversations(5, 100)


def jsonl(rows: list[list[dict[str, str]]]) -> str:
    return "".join(json.dumps({"messages": turns}) + "\n" for turns in rows)


@dataclass(frozen=True)
class Run:
    """A job that has succeeded, with all that can be seen of it."""

    config: dict[str, Any]
    path: Path
    job: dict[str, Any]
    events: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    adapter: dict[str, Any]
    record: dict[str, Any]
    weights: dict[str, torch.Tensor]
    checkpoints: list[Path]

    def data(self, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for event in self.events if event["kind"] == kind]

    @property
    def started(self) -> dict[str, Any]:
        (data,) = self.data("started")
        return data

    @property
    def built(self) -> dict[str, Any]:
        (data,) = self.data("built")
        return data

    @property
    def evaluated(self) -> dict[int, float]:
        return {data["step"]: data["eval_loss"] for data in self.data("evaluation")}

    @cached_property
    def all_rows(self) -> list[Tokens]:
        return replay.tokenize(self.path, TRAINING, self.config)

    @cached_property
    def rows(self) -> list[Tokens]:
        return [row for row in self.all_rows if row.learned]

    @cached_property
    def total_steps(self) -> int:
        if self.config["max_steps"] is not None:
            return int(self.config["max_steps"])
        steps = math.ceil(len(replay.order(self.rows, self.config, 0)) / self.config["gradient_accumulation"])
        return max(1, math.ceil(self.config["epochs"] * steps))

    @property
    def expected_end(self) -> tuple[int, int]:
        """The last step, and the one whose weights are handed out, by the evaluations that were reported."""
        patience, waits, best = self.config["early_stopping_patience"], 0, (math.inf, self.total_steps)
        if patience is None:
            return self.total_steps, self.total_steps
        for step, loss in sorted(self.evaluated.items()):
            if step == 0:
                continue
            waits = 0 if loss < best[0] else waits + 1
            best = min(best, (loss, step))
            if waits >= patience:
                return step, best[1]
        return self.total_steps, best[1]

    @property
    def expected_evaluations(self) -> list[int]:
        every, last = self.config["eval_every_steps"], self.expected_end[0]
        steps = {step for step in range(1, last + 1) if every is not None and step % every == 0}
        return sorted(steps | {0} | ({last} if last == self.total_steps else set()))

    @property
    def expected_checkpoints(self) -> list[int]:
        """After which steps one was due; none after the last, whose weights are handed out."""
        every, minutes = self.config["checkpoint_every_steps"], self.config["checkpoint_every_minutes"]
        steps = range(1, self.expected_end[0])
        return [step for step in steps if minutes == MANY_STEPS_MINUTES or (every is not None and step % every == 0)]

    @cached_property
    def replayed(self) -> Replay:
        last, handed_out = self.expected_end
        validation = [row for row in replay.tokenize(self.path, VALIDATION, self.config) if row.learned]
        return replay.run(
            self.path,
            self.config,
            self.rows,
            validation,
            steps=last,
            total=self.total_steps,
            keep=handed_out,
            evaluate=self.expected_evaluations,
        )

    @property
    def tolerance(self) -> float:
        # Sums in another order: sixteen bits of mantissa lost in bf16 and in dequantised products.
        return 1e-3 if self.config["precision"] == "fp32" else 3e-2

    @property
    def is_pissa(self) -> bool:
        return bool(self.config["init_weights"] == "pissa")


def check_rank(run: Run) -> None:
    assert run.built["ranks"] == [run.config["rank"]]
    assert run.adapter["r"] == run.config["rank"] * (2 if run.is_pissa else 1)  # handed out as plain LoRA
    assert {t.shape[0] for name, t in run.weights.items() if "lora_A" in name} == {run.adapter["r"]}


def check_alpha(run: Run) -> None:
    rank = run.config["rank"]
    expected = run.config["alpha"] / (math.sqrt(rank) if run.config["use_rslora"] else rank)
    assert run.built["scalings"] == pytest.approx([expected])
    assert run.adapter["lora_alpha"] == run.config["alpha"] * (2 if run.is_pissa else 1)


def check_use_rslora(run: Run) -> None:
    assert run.adapter["use_rslora"] is run.config["use_rslora"]


def check_dropout(run: Run) -> None:
    assert run.built["dropouts"] == [run.config["dropout"]]
    assert run.adapter["lora_dropout"] == run.config["dropout"]


def check_target_modules(run: Run) -> None:
    wanted = run.config["target_modules"]
    names = set(LLAMA_LINEARS) if wanted == "all-linear" else set(wanted)
    assert run.built["adapted_modules"] == dict.fromkeys(names, 2)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in run.weights} == names


def check_bias(run: Run) -> None:
    assert run.adapter["bias"] == "none" == run.config["bias"]
    assert all(".lora_" in name for name in run.weights)


def check_use_dora(run: Run) -> None:
    assert run.adapter["use_dora"] is run.config["use_dora"]
    modules = sum(run.built["adapted_modules"].values())
    assert run.built["dora_modules"] == (modules if run.config["use_dora"] else 0)
    assert sum("magnitude" in name for name in run.weights) == run.built["dora_modules"]


def check_init_weights(run: Run) -> None:
    """What was handed out lies where the replay ended, which began as the setting says."""
    off, moved = 0.0, 0.0
    for name, there in run.replayed.weights.items():
        found = run.weights[name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")]
        start = run.replayed.start[name]
        if run.is_pissa and "lora_A" in name:
            assert torch.allclose(found[run.config["rank"] :], start, rtol=1e-3, atol=1e-4)
            found = found[: run.config["rank"]]
        elif run.is_pissa:
            found = found[:, : run.config["rank"]] * (math.sqrt(2) if run.config["use_rslora"] else 1)
        off += float((found - there).norm() ** 2)
        moved += float((there - start).norm() ** 2)
        if "lora_A" in name:
            assert float((found - there).norm()) < 0.2 * float(start.norm())
    assert math.sqrt(off) <= (0.1 if run.config["precision"] == "fp32" else 0.5) * math.sqrt(moved)


def check_quantization(run: Run) -> None:
    expected = {"none": {}, "nf4": {"nf4 (double)": 14}}[run.config["quantization"]]
    assert run.built["quantized_modules"] == expected


def check_precision(run: Run) -> None:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[run.config["precision"]]
    stored = {"uint8"} if run.config["quantization"] == "nf4" else set()
    assert set(run.built["base_types"]) == {dtype} | stored
    assert run.built["compute_types"] == ([dtype] if stored else [])
    assert set(run.built["adapter_types"]) == {"float32"}


def check_learning_rate(run: Run) -> None:
    (group,) = run.built["groups"]
    assert group["learning_rate"] == run.config["learning_rate"]
    assert group["parameters"] == run.started["trainable_parameters"] == sum(run.built["adapter_types"].values())


def check_adam(run: Run) -> None:
    (group,) = run.built["groups"]
    assert group["betas"] == [run.config["adam_beta1"], run.config["adam_beta2"]]
    assert group["epsilon"] == run.config["adam_epsilon"]


def check_schedule(run: Run) -> None:
    expected = [replay.rate(run.config, step, run.total_steps) for step in range(len(run.metrics))]
    assert [row["learning_rate"] for row in run.metrics] == pytest.approx(expected, rel=1e-9, abs=1e-15)


def check_order(run: Run) -> None:
    """The same rows in the same batches: tokens exactly, losses and gradients' norms to rounding."""
    assert [row["tokens"] for row in run.metrics] == torch.tensor(run.replayed.tokens).cumsum(0).tolist()
    assert [row["loss"] for row in run.metrics] == pytest.approx(run.replayed.losses, rel=run.tolerance)
    norms = [row["grad_norm"] for row in run.metrics]
    assert norms == pytest.approx(run.replayed.norms, rel=20 * run.tolerance, abs=1e-4)


def check_steps(run: Run) -> None:
    assert run.started["total_steps"] == run.total_steps
    assert [row["step"] for row in run.metrics] == list(range(1, run.expected_end[0] + 1))


def check_weight_decay(run: Run) -> None:
    assert [group["weight_decay"] for group in run.built["groups"]] == [run.config["weight_decay"]]
    for folder in run.checkpoints:
        (group,) = json.loads((folder / "state.json").read_text())["settings"]["optimizer"]["groups"]
        assert group["weight_decay"] == run.config["weight_decay"]


def check_max_grad_norm(run: Run) -> None:
    """Adam's first moment is a mean of the gradients as clipped, and no step can have put in more than the clip."""
    for folder in run.checkpoints:
        state = load_file(folder / "optimizer.safetensors")
        found = float(torch.stack([t.norm() for name, t in state.items() if name.endswith(".exp_avg")]).norm())
        step = int(folder.name.removeprefix("step-"))
        assert found <= run.config["max_grad_norm"] * (1 - run.config["adam_beta1"] ** step) * 1.001
        assert found == pytest.approx(run.replayed.momentum[step - 1], rel=20 * run.tolerance, abs=1e-5)


def check_max_seq_length(run: Run) -> None:
    assert run.started["rows"] == len(run.rows)
    assert run.started["skipped_rows"] == len(run.all_rows) - len(run.rows)
    assert run.started["truncated_rows"] == sum(row.cut for row in run.rows)
    assert sum(row["tokens"] for row in run.metrics[:1]) <= (
        run.config["max_seq_length"] * run.config["batch_size"] * run.config["gradient_accumulation"]
    )


def check_optimizer(run: Run) -> None:
    assert run.built["optimizer"] == {"adamw": "torch.AdamW"}[run.config["optimizer"]]


def check_gradient_checkpointing(run: Run) -> None:
    assert (run.built["checkpointed_modules"] > 0) is run.config["gradient_checkpointing"]


def check_train_on(run: Run) -> None:
    assert run.started["trained_tokens"] == sum(row.learned for row in run.rows)


def check_evaluations(run: Run) -> None:
    assert sorted(run.evaluated) == run.expected_evaluations
    # To rounding, which grows with the step as the weights part.
    assert run.evaluated == pytest.approx(run.replayed.evaluations, rel=2 * run.tolerance)


def check_early_stopping(run: Run) -> None:
    last, handed_out = run.expected_end
    outcome = run.record["outcome"]
    assert (outcome["steps"], outcome["adapter_step"]) == (last, handed_out)
    assert run.job["metrics"]["adapter_step"] == handed_out


def check_checkpoints(run: Run) -> None:
    assert [data["step"] for data in run.data("checkpoint")] == run.expected_checkpoints


def check_keep_checkpoints(run: Run) -> None:
    kept = run.expected_checkpoints[-run.config["keep_checkpoints"] :]
    assert [folder.name for folder in run.checkpoints] == [f"step-{step:08d}" for step in kept]


CHECKS: dict[str, Callable[[Run], None]] = {
    "rank": check_rank,
    "alpha": check_alpha,
    "dropout": check_dropout,
    "target_modules": check_target_modules,
    "bias": check_bias,
    "use_rslora": check_use_rslora,
    "use_dora": check_use_dora,
    "init_weights": check_init_weights,
    "quantization": check_quantization,
    "precision": check_precision,
    "learning_rate": check_learning_rate,
    "batch_size": check_order,
    "gradient_accumulation": check_order,
    "epochs": check_steps,
    "max_steps": check_steps,
    "warmup_ratio": check_schedule,
    "scheduler": check_schedule,
    "min_learning_rate_ratio": check_schedule,
    "adam_beta1": check_adam,
    "adam_beta2": check_adam,
    "adam_epsilon": check_adam,
    "neftune_noise_alpha": check_order,
    "weight_decay": check_weight_decay,
    "max_grad_norm": check_max_grad_norm,
    "max_seq_length": check_max_seq_length,
    "packing": check_order,
    "optimizer": check_optimizer,
    "gradient_checkpointing": check_gradient_checkpointing,
    "train_on": check_train_on,
    "seed": check_order,
    "eval_every_steps": check_evaluations,
    "early_stopping_patience": check_early_stopping,
    "checkpoint_every_steps": check_checkpoints,
    "checkpoint_every_minutes": check_checkpoints,
    "keep_checkpoints": check_keep_checkpoints,
}


def test_every_setting_has_a_check() -> None:
    assert set(CHECKS) == set(PARAMETER_NAMES)


def train(studio: StudioServer, path: Path, algorithm: Algorithm, overrides: dict[str, Any]) -> Run:
    """Submit a configuration over HTTP, and collect what the run leaves."""
    sets = [studio.upload(jsonl(rows))["id"] for rows in (TRAINING, VALIDATION)]
    job_id = studio.submit(
        model_id=TINY_ID,
        dataset_id=sets[0],
        validation_dataset_id=sets[1],
        algorithm=algorithm.value,
        overrides=overrides,
    )["id"]
    studio.events(job_id)
    job = studio.job(job_id)
    assert job["state"] == "succeeded", job["error"]
    events = studio.http.get(f"/api/training/jobs/{job_id}/events", params={"format": "json"}).json()["events"]
    content = studio.http.get(f"/api/adapters/{job['adapter_id']}/download").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        adapter, record = (json.loads(archive.read(name)) for name in ("adapter_config.json", "training.json"))
        weights = load(archive.read("adapter_model.safetensors"))
    assert job["config"] == record["config"] == job["config"] | overrides
    listed = studio.http.get(f"/api/training/jobs/{job_id}/checkpoints").json()["checkpoints"]
    folders = sorted((studio.home / "checkpoints" / job_id).glob("step-*"))
    assert sorted(item["step"] for item in listed) == [int(folder.name.removeprefix("step-")) for folder in folders]
    metrics = studio.http.get(f"/api/training/jobs/{job_id}/metrics").json()["metrics"]
    return Run(job["config"], path, job, events, metrics, adapter, record, weights, folders)


def check_all(studio: StudioServer, path: Path, algorithm: Algorithm, overrides: dict[str, Any]) -> None:
    run = train(studio, path, algorithm, overrides)
    failures = []
    for check in dict.fromkeys(CHECKS.values()):
        try:
            check(run)
        except AssertionError as error:
            failures.append(f"{check.__name__}: {error}")
    assert not failures, "\n".join(failures)


# Every example is a run: none is shrunk, and the same ones are drawn each time.
few = settings(
    max_examples=9,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    deadline=None,
)


@few
@given(requests(quantization="none", precision="fp32"))
def test_every_setting_arrives(
    studio: StudioServer, tiny_path: Path, request_: tuple[Algorithm, dict[str, Any]]
) -> None:
    check_all(studio, tiny_path, *request_)


@settings(few, max_examples=4)
@given(requests(quantization="nf4", precision="bf16"))
def test_every_setting_arrives_on_a_quantised_base(
    studio: StudioServer, tiny_path: Path, request_: tuple[Algorithm, dict[str, Any]]
) -> None:
    check_all(studio, tiny_path, *request_)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(few, max_examples=60, derandomize=False)
@given(requests())
def test_every_setting_arrives_on_every_base(
    studio: StudioServer, tiny_path: Path, request_: tuple[Algorithm, dict[str, Any]]
) -> None:
    check_all(studio, tiny_path, *request_)
