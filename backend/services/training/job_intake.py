"""Checks a client's request for a training: it becomes a job, or is refused with the reason."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from core.errors import CheckpointUnusable, SettingRejected
from domain.jobs.openai_request import OpenAIRequest
from domain.jobs.progress import JobProgress
from domain.memory.activations import Batch
from domain.memory.hardware_fit import FITTED
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.config import PeftConfig, recorded
from domain.peft.initial_adapter import InitialAdapter
from domain.peft.objectives import SPECS as OBJECTIVES
from domain.peft.objectives import usual_settings
from domain.peft.use_cases import UseCaseId
from services.dataset_service import DatasetService
from services.peft_service import LoadedModel, ModelOnDevice, PeftService
from services.training.checkpoint_store import CheckpointStore
from services.training.dataset_analysis import DatasetAnalysisService
from services.training.initial_adapters import InitialAdapters
from store.records import DatasetRecord, JobRecord


@dataclass(frozen=True)
class JobRequest:
    """A client's request for a training.

    Attributes:
        algorithm: None for that of the initial adapter.
        initial_adapter_id: The adapter whose weights it begins with.
    """

    model_id: str | None
    loaded_model_id: str | None
    revision: str | None
    dataset_id: str
    validation_dataset_id: str | None
    validation_fraction: float
    use_case: UseCaseId | None
    algorithm: Algorithm | None
    overrides: dict[str, Any]
    name: str | None
    priority: int
    resume_from: str | None
    idempotency_key: str | None
    force: bool
    gpus: int = 1
    openai_request: OpenAIRequest | None = None
    initial_adapter_id: str | None = None


_MUST_MATCH = (
    "model_id", "revision", "algorithm", "dataset_id", "validation_dataset_id", "validation_fraction",
    "initial_adapter_id",
)  # fmt: skip
# The settings that may differ between a run and the one whose checkpoint it begins with.
_MAY_DIFFER = frozenset({
    "epochs", "max_steps", "eval_every_steps", "early_stopping_patience",
    "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints",
})  # fmt: skip


class JobIntake:
    """Checks requests and writes their records."""

    def __init__(
        self,
        datasets: DatasetService,
        peft: PeftService,
        analyses: DatasetAnalysisService,
        checkpoints: CheckpointStore,
        initial_adapters: InitialAdapters,
    ) -> None:
        self.datasets, self.peft, self.analyses, self.checkpoints = datasets, peft, analyses, checkpoints
        self.initial_adapters = initial_adapters

    def record(self, request: JobRequest, job_id: str, source: JobRecord | None, now: str) -> JobRecord:
        """Return the job that a request asks for; its sequence number is given when it is stored.

        Args:
            request: What is wanted.
            job_id: The new job's id.
            source: The job whose checkpoint it begins with, if `resume_from` names one.
            now: The time.

        Raises:
            SettingRejected: A setting cannot take effect.
            DatasetNotFound, ModelNotFound, LoadedModelNotFound, CheckpointNotFound, AdapterNotFound: What it names does
                not exist.
            CheckpointUnusable: The checkpoint is damaged or belongs to another kind of run.
            AdapterDamaged, AdapterNotContinuable: No run can begin with the adapter.
            DoesNotFit: It needs more memory than there is, and `force` is not set.
        """
        loaded = self.peft.get(request.loaded_model_id) if request.loaded_model_id is not None else None
        continues = request.initial_adapter_id
        initial = self.initial_adapters.get(continues) if continues is not None else None
        algorithm = request.algorithm or (initial.algorithm if initial is not None else Algorithm.LORA)
        model_id, revision = _model_of(request, loaded, initial)
        overrides = _overrides(request, algorithm, loaded, source, initial)
        dataset = self.datasets.get(request.dataset_id)
        overrides = usual_settings(dataset.format) | overrides
        where = self.peft.on_device(model_id, revision, loaded=loaded)
        config = self.peft.configure(algorithm, request.use_case, overrides, where, initial).config
        self._check_gpus(request, config)
        self._check_data(request, config)
        for dataset_id in filter(None, (request.dataset_id, request.validation_dataset_id)):
            self.analyses.check_learnable(dataset_id, model_id, revision, config)
        record = JobRecord(
            id=job_id,
            name=request.name or f"{algorithm.value} on {model_id.rsplit('/', 1)[-1]}",
            priority=request.priority,
            idempotency_key=request.idempotency_key,
            request_sha256=digest_of(request),
            model_id=model_id,
            revision=revision,
            loaded_model_id=request.loaded_model_id,
            load_options=loaded.base.wanted.options if loaded is not None else None,
            algorithm=algorithm.value,
            config=config.model_dump(mode="json"),
            dataset_id=request.dataset_id,
            validation_dataset_id=request.validation_dataset_id,
            validation_fraction=request.validation_fraction,
            gpus=request.gpus,
            progress=JobProgress(forced=True) if request.force else JobProgress(),
            openai_request=request.openai_request,
            initial_adapter_id=request.initial_adapter_id,
            created_at=now,
        )
        checkpoint = self._checkpoint_for(record, source, request.resume_from)
        if not request.force:
            # The last check, since it may unload idle models.
            self.peft.admit_run(where, config, self._largest_batch(dataset, where, config))
        return self._begin_with(*checkpoint, record) if checkpoint is not None else record

    def _check_gpus(self, request: JobRequest, config: PeftConfig) -> None:
        """Refuse more GPUs than there are, or than a step has passes for."""
        if request.gpus == 1:
            return
        there, passes = self.peft.gpus(), config.gradient_accumulation
        if request.gpus > there:
            raise _rejected("gpus", f"this machine has {there} that can train")
        if request.loaded_model_id is not None:
            raise _rejected("gpus", "a loaded model is on one GPU; name the model_id instead of the loaded_model_id")
        if request.gpus > passes:
            raise _rejected(
                "gpus",
                f"a step has {passes} passes (gradient_accumulation) to deal to {request.gpus} GPUs; a smaller "
                f"batch_size with gradient_accumulation={request.gpus} or more keeps the effective batch",
            )

    def _check_data(self, request: JobRequest, config: PeftConfig) -> None:
        record = self.datasets.check_trainable(request.dataset_id, config.train_on, config.objective)
        repeated = self.datasets.manifest(request.dataset_id).duplicates or 0
        if request.validation_fraction > 0 and record.rows - repeated < 2:
            raise _rejected("validation_fraction", "all rows are the same: none can be held out for validation")
        if request.validation_dataset_id is not None:
            self.datasets.check_trainable(request.validation_dataset_id, config.train_on, config.objective)
            if request.validation_fraction > 0:
                raise _rejected("validation_fraction", "use it or validation_dataset_id, not both")
        has_validation = request.validation_dataset_id is not None or request.validation_fraction > 0
        for name in ("early_stopping_patience", "eval_every_steps"):
            if getattr(config, name) is not None and not has_validation:
                raise _rejected(name, "needs validation_dataset_id or validation_fraction")

    def _largest_batch(self, dataset: DatasetRecord, where: ModelOnDevice, config: PeftConfig) -> Batch:
        rows = min(config.batch_size, dataset.rows) * OBJECTIVES[config.objective].sequences
        longest = self.analyses.longest_row(dataset.id, where.model_id, where.revision)
        if config.packing or longest is None:
            longest = config.max_seq_length
        return Batch(rows, min(longest, config.max_seq_length), config.packing or rows > 1)

    def _checkpoint_for(
        self, record: JobRecord, source: JobRecord | None, resume_from: str | None
    ) -> tuple[str, str, int] | None:
        """Return the job, the id and the step of the checkpoint that a new job begins with; None without one."""
        if source is None or resume_from is None:
            return None
        checkpoint_id, about = self.checkpoints.about(source.id, resume_from.partition("/")[2] or None)
        pairs = {name: (getattr(source, name), getattr(record, name)) for name in _MUST_MATCH}
        earlier = recorded(source.config).model_dump(mode="json")
        pairs |= {name: (earlier[name], value) for name, value in record.config.items() if name not in _MAY_DIFFER}
        different = [f"{name} was {old!r}, not {new!r}" for name, (old, new) in sorted(pairs.items()) if old != new]
        if different:
            raise CheckpointUnusable(f"{resume_from} belongs to another kind of run: {'; '.join(different)}.")
        last = record.config["max_steps"]
        if last is not None and last <= about["step"]:
            raise CheckpointUnusable(f"{resume_from} is at step {about['step']} already; max_steps={last} adds none.")
        return source.id, checkpoint_id, about["step"]

    def _begin_with(self, source_id: str, checkpoint_id: str, step: int, record: JobRecord) -> JobRecord:
        """Give the new job a checkpoint of another."""
        self.checkpoints.copy(source_id, checkpoint_id, record.id)
        return replace(record, progress=record.progress.begun_with(step), resumed_from=f"{source_id}/{checkpoint_id}")


def _model_of(
    request: JobRequest, loaded: LoadedModel | None, initial: InitialAdapter | None
) -> tuple[str, str | None]:
    if loaded is None:
        if initial is not None:
            return initial.base_for(request.model_id, request.revision)
        if request.model_id is None:
            raise _rejected("model_id", "name a model_id or a loaded_model_id")
        return request.model_id, request.revision
    if request.model_id is not None and request.model_id != loaded.model_id:
        raise _rejected("model_id", f"the loaded model is {loaded.model_id}; leave model_id out")
    if initial is not None and (loaded.model_id, loaded.revision) != (initial.base_model_id, initial.base_revision):
        raise _rejected("loaded_model_id", f"{initial.id} belongs to {initial.base}, and this is another model")
    return loaded.model_id, loaded.revision


def _overrides(
    request: JobRequest,
    algorithm: Algorithm,
    loaded: LoadedModel | None,
    source: JobRecord | None,
    initial: InitialAdapter | None,
) -> dict[str, Any]:
    """Return the settings of a job that are not left to the defaults.

    They come from its client, from the loaded model that it names, and from the job whose checkpoint it begins with:

    - Quantization and precision are those of the loaded model. A request for others is refused.
    - The settings that the client chose when it loaded the model hold for jobs of the same algorithm, but for those
      that follow from the adapter that the job continues.
    - The settings that were fitted to the memory for the earlier job stay as they are.
    """
    overrides = dict(request.overrides)
    if loaded is not None:
        if loaded.algorithm == algorithm:
            asked = _asked_of(loaded, overrides)
            decided = initial.decided if initial is not None else {}
            overrides = {name: value for name, value in asked.items() if name not in decided} | overrides
        for name in ("quantization", "precision"):
            have = getattr(loaded.base.key, name)
            wanted = overrides.get(name, SPECS[algorithm].fixed.get(name, have))
            if wanted != have:
                raise _rejected(name, f"the loaded model has {name}={have!r}, the job needs {wanted!r}; load another")
            overrides[name] = have
    if source is not None:
        overrides = {name: getattr(recorded(source.config), name) for name in FITTED} | overrides
    return overrides


def _asked_of(loaded: LoadedModel, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were chosen for a loaded model, without the length of a run if the job sets one."""
    own_length = {"epochs", "max_steps"} & overrides.keys()
    return {name: value for name, value in loaded.asked.items() if not (own_length and name in ("epochs", "max_steps"))}


def digest_of(request: JobRequest) -> str:
    """Return a digest of a request, which tells whether two requests are the same."""
    values = dict(request.__dict__)
    del values["openai_request"]  # what it says is in the others, or changes nothing
    if request.gpus == 1:
        del values["gpus"]  # requests that are stored already have no such field
    if request.initial_adapter_id is None:
        del values["initial_adapter_id"]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _rejected(location: str, message: str) -> SettingRejected:
    return SettingRejected.of((location,), message)
