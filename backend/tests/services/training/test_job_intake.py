"""A job that is refused has changed nothing."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from core.errors import CheckpointUnusable, SettingRejected
from domain.configure import Configuration, MachineFacts, configure
from domain.jobs.progress import JobProgress
from domain.memory.activations import Batch
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.peft.initial_adapter import InitialAdapter
from domain.peft.objectives import Objective
from domain.peft.use_cases import UseCaseId
from services.dataset_service import DatasetService
from services.datasets.files import Manifest
from services.hardware.devices import Device
from services.peft_service import LoadedModel, ModelOnDevice, PeftService
from services.training.checkpoint_store import CheckpointStore
from services.training.dataset_analysis import DatasetAnalysisService
from services.training.initial_adapters import InitialAdapters
from services.training.job_intake import JobIntake, JobRequest, digest_of
from store.records import DatasetRecord

REQUEST = JobRequest(
    model_id="m", loaded_model_id=None, revision=None, dataset_id="ds", validation_dataset_id=None,
    validation_fraction=0.0, use_case=None, algorithm=Algorithm.LORA, overrides={}, name=None, priority=0,
    resume_from=None, idempotency_key=None, force=False,
)  # fmt: skip
DATASET = DatasetRecord("ds", "n", "messages", 5, 0, 1, "0" * 64, [], [], "now")
MACHINE = MachineFacts(has_gpu=False, supports_bf16=False)


class OneDataset(DatasetService):
    """One dataset, which can be trained on."""

    def __init__(self) -> None:
        pass

    def get(self, dataset_id: str) -> DatasetRecord:
        return DATASET

    def check_trainable(self, dataset_id: str, train_on: str, objective: Objective = "sft") -> DatasetRecord:
        return DATASET

    def manifest(self, dataset_id: str) -> Manifest:
        return Manifest((), {}, duplicates=0)


class Room(PeftService):
    """Has two GPUs and room for every run, and keeps the models that it made room for."""

    def __init__(self) -> None:
        self.admitted: list[str] = []

    def gpus(self) -> int:
        return 2

    def on_device(
        self, model_id: str, revision: str | None, device: str | int = "auto", loaded: LoadedModel | None = None
    ) -> ModelOnDevice:
        return ModelOnDevice(model_id, revision, None, Device("cpu", MACHINE, None))

    def configure(
        self,
        algorithm: Algorithm,
        use_case: UseCaseId | None,
        overrides: dict[str, Any],
        where: ModelOnDevice | None = None,
        initial: InitialAdapter | None = None,
    ) -> Configuration:
        return configure(algorithm, use_case=None, overrides=overrides, machine=MACHINE, initial=initial)

    def admit_run(self, where: ModelOnDevice, config: PeftConfig, batch: Batch) -> None:
        self.admitted.append(where.model_id)


class NoAnalyses(DatasetAnalysisService):
    """No dataset has been analysed."""

    def __init__(self) -> None:
        pass

    def check_learnable(self, dataset_id: str, model_id: str, revision: str | None, config: PeftConfig) -> None:
        pass

    def longest_row(self, dataset_id: str, model_id: str, revision: str | None) -> int | None:
        return None


class OneCheckpoint(CheckpointStore):
    """One checkpoint, of step 5; keeps the jobs whose checkpoint was copied."""

    def __init__(self) -> None:
        self.copied: list[str] = []

    def about(self, job_id: str, checkpoint_id: str | None) -> tuple[str, dict[str, Any]]:
        return "step-5", {"step": 5}

    def copy(self, job_id: str, checkpoint_id: str, to_job_id: str) -> None:
        self.copied.append(job_id)


ADAPTER = InitialAdapter(
    "adp_1", "m", None, Algorithm.RSLORA,
    {"rank": 3, "alpha": 5, "use_rslora": True, "use_dora": False, "target_modules": ["q"], "init_weights": "adapter"},
)  # fmt: skip


class OneAdapter(InitialAdapters):
    """One adapter to continue, of the model m."""

    def __init__(self) -> None:
        pass

    def get(self, adapter_id: str) -> InitialAdapter:
        return ADAPTER


def test_room_is_made_only_for_a_job_that_nothing_else_refuses() -> None:
    room, checkpoints = Room(), OneCheckpoint()
    admitted, copied = room.admitted, checkpoints.copied
    intake = JobIntake(OneDataset(), room, NoAnalyses(), checkpoints, OneAdapter())
    first = intake.record(REQUEST, "job_1", None, "now")
    assert admitted == ["m"] and not copied

    other = replace(REQUEST, resume_from="job_1", overrides={"rank": 3})
    with pytest.raises(CheckpointUnusable, match="rank was 16, not 3"):
        intake.record(other, "job_2", first, "now")
    assert admitted == ["m"] and not copied

    again = intake.record(replace(REQUEST, resume_from="job_1"), "job_3", first, "now")
    assert admitted == ["m", "m"] and copied == ["job_1"]
    assert again.resumed_from == "job_1/step-5" and again.progress == JobProgress(step=5, recorded_step=5)


@pytest.mark.parametrize(
    ("gpus", "accumulation", "why"),
    [
        (3, 4, "gpus: this machine has 2 that can train"),
        (2, 1, r"gpus: a step has 1 passes \(gradient_accumulation\) to deal to 2 GPUs"),
    ],
)
def test_more_gpus_than_there_are_or_than_a_step_has_passes_for_are_refused(
    gpus: int, accumulation: int, why: str
) -> None:
    intake = JobIntake(OneDataset(), Room(), NoAnalyses(), OneCheckpoint(), OneAdapter())
    overrides = {"gradient_accumulation": accumulation}
    with pytest.raises(SettingRejected, match=why):
        intake.record(replace(REQUEST, gpus=gpus, overrides=overrides), "job_1", None, "now")


def test_a_job_keeps_its_gpus_and_may_go_on_with_another_number() -> None:
    intake = JobIntake(OneDataset(), Room(), NoAnalyses(), OneCheckpoint(), OneAdapter())
    first = intake.record(replace(REQUEST, gpus=2, overrides={"gradient_accumulation": 4}), "job_1", None, "now")
    assert first.gpus == 2
    on_one = replace(REQUEST, overrides={"gradient_accumulation": 4}, resume_from="job_1")
    assert intake.record(on_one, "job_2", first, "now").gpus == 1


def test_a_request_for_one_gpu_has_the_digest_that_earlier_versions_stored() -> None:
    earlier = {
        name: value
        for name, value in REQUEST.__dict__.items()
        if name not in ("gpus", "openai_request", "initial_adapter_id")
    }
    text = json.dumps(earlier, sort_keys=True, default=str)
    assert digest_of(REQUEST) == hashlib.sha256(text.encode()).hexdigest() != digest_of(replace(REQUEST, gpus=2))


CONTINUES = replace(REQUEST, model_id=None, algorithm=None, initial_adapter_id="adp_1")


def test_a_job_that_continues_an_adapter_has_what_that_decides() -> None:
    intake = JobIntake(OneDataset(), Room(), NoAnalyses(), OneCheckpoint(), OneAdapter())
    job = intake.record(CONTINUES, "job_1", None, "now")
    assert (job.model_id, job.algorithm, job.initial_adapter_id) == ("m", "rslora", "adp_1")
    assert {name: job.config[name] for name in ADAPTER.decided} == ADAPTER.decided
    same = replace(CONTINUES, overrides={"rank": 3, "learning_rate": 0.5})
    assert intake.record(same, "job_2", None, "now").config["learning_rate"] == 0.5
    assert digest_of(CONTINUES) != digest_of(replace(CONTINUES, initial_adapter_id="adp_2"))


@pytest.mark.parametrize(
    ("changes", "field", "why"),
    [
        ({"overrides": {"rank": 4}}, "rank", "continues adp_1, which has 3"),
        ({"overrides": {"target_modules": ["v"]}}, "target_modules", "which has .'q'.; leave it out"),
        ({"overrides": {"init_weights": "gaussian"}}, "init_weights", "which has 'adapter'"),
        ({"algorithm": Algorithm.DORA}, "algorithm", "DoRA requires use_dora=True, and adp_1 has False"),
        ({"algorithm": Algorithm.PISSA}, "algorithm", "PiSSA requires init_weights='pissa'"),
        ({"model_id": "other"}, "model_id", "adp_1 belongs to m"),
        ({"revision": "main"}, "revision", "adp_1 belongs to m"),
        (
            {"initial_adapter_id": None, "model_id": "m", "overrides": {"init_weights": "adapter"}},
            "init_weights",
            "needs",
        ),
    ],
)
def test_what_contradicts_the_adapter_that_is_continued_is_refused(
    changes: dict[str, Any], field: str, why: str
) -> None:
    intake = JobIntake(OneDataset(), Room(), NoAnalyses(), OneCheckpoint(), OneAdapter())
    with pytest.raises(SettingRejected, match=why) as refused:
        intake.record(replace(CONTINUES, **changes), "job_1", None, "now")
    assert refused.value.extras["errors"][0]["location"] == [field]


def test_a_checkpoint_of_a_run_that_continued_an_adapter_goes_on_as_such_a_run_alone() -> None:
    intake = JobIntake(OneDataset(), Room(), NoAnalyses(), OneCheckpoint(), OneAdapter())
    first = intake.record(CONTINUES, "job_1", None, "now")
    again = intake.record(replace(CONTINUES, resume_from="job_1"), "job_2", first, "now")
    assert (again.resumed_from, again.initial_adapter_id) == ("job_1/step-5", "adp_1")
    with pytest.raises(CheckpointUnusable, match="initial_adapter_id was 'adp_1', not None"):
        intake.record(replace(REQUEST, algorithm=Algorithm.RSLORA, resume_from="job_1"), "job_3", first, "now")
