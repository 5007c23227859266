"""A checkpoint as an adapter: written by an engine from the run's state, as the run itself hands one out."""

import threading
import time

from core.clock import Clock
from core.errors import AdapterNotFound, ModelBusy
from domain import protocol
from domain.peft.algorithms import Algorithm
from domain.peft.config import recorded
from services.adapter_service import AdapterService
from services.dataset_service import DatasetService
from services.loading.borrowing import Wait, borrow
from services.peft_service import ConfiguredLoad, PeftService
from services.training.checkpoint_store import CheckpointStore
from services.training.lineage import lineage_of
from services.training.run_card import about_run
from store.records import AdapterRecord, JobRecord, to_text

_WAIT_S = 300.0  # for the base to load, or to be free
_LOOK_AGAIN_S = 0.1


def checkpoint_adapter_id(job_id: str, step: int) -> str:
    """Return the id of the adapter that a checkpoint becomes."""
    return f"adp_{job_id.removeprefix('job_')}s{step}"


class CheckpointAdapters:
    """Makes adapters of checkpoints, each once.

    Args:
        peft: Loads the base, whose engine writes the adapter.
        datasets: Where the run's rows are.
        adapters: Where the adapter goes.
        checkpoints: Where the checkpoints are.
        clock: For the time of the record.
    """

    def __init__(
        self,
        peft: PeftService,
        datasets: DatasetService,
        adapters: AdapterService,
        checkpoints: CheckpointStore,
        clock: Clock,
    ) -> None:
        self._peft, self._datasets, self._adapters = peft, datasets, adapters
        self._checkpoints, self._clock = checkpoints, clock
        self._lock = threading.Lock()

    def has(self, job_id: str, step: int) -> bool:
        """Tell whether a job has a checkpoint of a step."""
        return any(facts.step == step for facts in self._checkpoints.all(job_id, check_sums=False))

    def adapter_of(self, job: JobRecord, step: int) -> AdapterRecord:
        """Return the adapter of a checkpoint; the first call makes it.

        Raises:
            CheckpointNotFound, CheckpointUnusable: The job has no such checkpoint, or it is damaged.
            ModelBusy: The base did not come free in time.
            StudioError: As loading the base says, or the engine.
        """
        adapter_id = checkpoint_adapter_id(job.id, step)
        with self._lock:
            try:
                return self._adapters.get(adapter_id)
            except AdapterNotFound:
                return self._make(job, step, adapter_id)

    def _make(self, job: JobRecord, step: int, adapter_id: str) -> AdapterRecord:
        checkpoint_id, _ = self._checkpoints.about(job.id, f"step-{step:08d}")
        config = recorded(job.config)
        model = self._peft.load(ConfiguredLoad(job.model_id, job.revision, Algorithm(job.algorithm), config))
        scratch = f"handout_{adapter_id}"  # a folder with this checkpoint alone: the engine takes the newest
        self._checkpoints.delete(scratch)
        self._checkpoints.copy(job.id, checkpoint_id, scratch)
        validation = job.validation_dataset_id
        about = about_run(self._datasets, job)
        command = protocol.Train(
            adapter_id=adapter_id,
            config=config.model_copy(update={"early_stopping_patience": None}),  # this step's weights, not the best's
            dataset_path=str(self._datasets.rows_path(job.dataset_id)),
            validation_path=str(self._datasets.rows_path(validation)) if validation is not None else None,
            validation_fraction=job.validation_fraction,
            output_path=str(self._adapters.path_for(adapter_id)),
            base_model_id=job.model_id,
            base_revision=job.revision,
            checkpoints_path=str(self._checkpoints.folder_of(scratch)),
            max_checkpoint_bytes=None,
            recorded_step=step,
            about=about,
            hands_out=True,
        )
        try:
            with borrow(model, f"writing {adapter_id}", _patience()) as process:
                figures = process.request(command).result()
                model.base.attached(adapter_id, figures.memory_bytes)
        finally:
            self._checkpoints.delete(scratch)
        return self._adapters.add(
            AdapterRecord(
                id=adapter_id,
                name=job.name,
                base_model_id=job.model_id,
                base_revision=job.revision,
                algorithm=job.algorithm,
                config=job.config,
                job_id=job.id,
                dataset_sha256=about.dataset_sha256,
                metrics=figures.as_json(),
                path=command.output_path,
                created_at=to_text(self._clock.now()),
                version=0,  # given when it is stored
                source={"kind": "checkpoint", "job_id": job.id, "step": step, **lineage_of(job)},
            )
        )


def _patience() -> Wait:
    """Return what waits for a base, but not for ever."""
    until_s = time.monotonic() + _WAIT_S

    def wait(what: str, _fraction: float | None) -> None:
        if time.monotonic() > until_s:
            raise ModelBusy(f"{what}; try again later.")
        time.sleep(_LOOK_AGAIN_S)

    return wait
