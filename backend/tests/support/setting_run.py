"""A fine-tune submitted over HTTP, with all that can be seen of it and what its settings make one expect."""

import io
import json
import math
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from domain.peft.algorithms import Algorithm
from tests.support import replay
from tests.support.drawn_settings import MANY_STEPS_MINUTES
from tests.support.replay import Replay, Tokens
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID


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
        batches = len(replay.order(self.rows, self.config, 0))
        steps = math.ceil(batches / int(self.config["gradient_accumulation"]))
        return max(1, math.ceil(float(self.config["epochs"]) * steps))

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
        """After which steps one is due. There is always one after the last, from which a run can be trained longer."""
        every, minutes = self.config["checkpoint_every_steps"], self.config["checkpoint_every_minutes"]
        last = self.expected_end[0]
        always = minutes == MANY_STEPS_MINUTES
        return [step for step in range(1, last) if always or (every is not None and step % every == 0)] + [last]

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
    def is_doubled(self) -> bool:
        """Whether other weights than the base's were under the adapter, so that it is handed out with twice the rank.

        Source: docs/methods.md, column "converts".
        """
        return self.config["init_weights"] in ("pissa", "olora") or (self.config["loftq_iterations"] or 0) > 1

    def handed_out(self, name: str) -> torch.Tensor:
        """Return a tensor of the adapter's file, with A's parts above each other, by the name that it trains under."""
        found = self.weights[name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")]
        if self.is_doubled and "lora_B" in name:  # s' is √2·s with rsLoRA, where the rank doubles with alpha
            return found.T * (math.sqrt(2) if self.config["use_rslora"] else 1)
        return found


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
    asked = {name: value for name, value in overrides.items() if (name, value) != ("target_experts", "auto")}
    assert job["config"] == record["config"] == job["config"] | asked
    listed = studio.http.get(f"/api/training/jobs/{job_id}/checkpoints").json()["checkpoints"]
    folders = sorted((studio.home / "checkpoints" / job_id).glob("step-*"))
    assert sorted(item["step"] for item in listed) == [int(folder.name.removeprefix("step-")) for folder in folders]
    metrics = studio.http.get(f"/api/training/jobs/{job_id}/metrics").json()["metrics"]
    return Run(job["config"], path, job, events, metrics, adapter, record, weights, folders)
