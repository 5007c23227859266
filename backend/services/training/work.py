"""The work of a run: pick or load a base, borrow it, and have its engine train."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from core.errors import LoadedModelNotFound, SettingRejected
from domain import protocol
from domain.jobs.figures import TrainingFigures
from domain.jobs.progress import EngineUsed
from domain.models.load_states import GONE
from domain.peft.algorithms import Algorithm
from domain.peft.config import recorded
from services.adapter_service import AdapterService
from services.dataset_service import DatasetService
from services.engines.process import EngineDied, EngineProcess
from services.loading.borrowing import borrow
from services.peft_service import ConfiguredLoad, LoadedModel, PeftService
from services.training.checkpoint_store import CheckpointStore
from services.training.dataset_analysis import DatasetAnalysisService
from services.training.learnable import require_learnable
from services.training.run_card import about_run
from services.training.run_control import RunControl
from services.training.run_journal import RunJournal
from services.training.running_job import RunningJob
from store.records import JobRecord


@dataclass(frozen=True)
class Trained:
    """An adapter, and the model that it was trained on.

    Attributes:
        path: Its folder.
        dataset_sha256: Of the rows that it was trained on.
        log_tail: The engine's last lines.
    """

    model: LoadedModel
    adapter_id: str
    path: str
    dataset_sha256: str
    figures: TrainingFigures
    log_tail: list[str]


class TrainingWork:
    """Trains a job's adapter.

    Args:
        peft: Loads the base.
        datasets: Where the rows are.
        adapters: Where the adapter goes.
        analyses: Tell whether anything can be learned.
        checkpoints: Where engines leave the state of their runs.
        max_checkpoint_bytes: Most bytes of checkpoints a job keeps; None for no limit.
        oom_kills: Counts the processes that the kernel has killed for want of memory.
    """

    def __init__(
        self,
        peft: PeftService,
        datasets: DatasetService,
        adapters: AdapterService,
        analyses: DatasetAnalysisService,
        checkpoints: CheckpointStore,
        max_checkpoint_bytes: int | None,
        oom_kills: Callable[[], int],
    ) -> None:
        self._peft, self._datasets, self._adapters, self._analyses = peft, datasets, adapters, analyses
        self._checkpoints, self._max_checkpoint_bytes = checkpoints, max_checkpoint_bytes
        self.oom_kills = oom_kills

    def run(
        self,
        job: RunningJob,
        devices: tuple[str, ...],
        control: RunControl,
        journal: RunJournal,
        on_event: Callable[[protocol.RunEvent], None],
    ) -> Trained:
        """Train.

        Args:
            job: What is trained.
            devices: Where, unless the job names a loaded model: `cpu`, or the index of each GPU. The base is loaded on
                the first; the others hold copies of it while the job trains.
            control: Stops it.
            journal: Knows the progress of earlier runs of the job.
            on_event: Takes the engine's events.

        Raises:
            RunStopped: Somebody stopped it before the engine began.
            StudioError: As loading the base says, or the engine.
        """
        if len(devices) < job.record.gpus:
            wanted = f"gpus: the job takes {job.record.gpus} GPUs, and this machine has {len(devices)} that can train"
            raise SettingRejected(wanted, errors=[{"location": ["gpus"], "message": wanted}])
        self._check_data(job, control, journal)
        known = {model.id for model in self._peft.models()}
        model = self._find_or_load(job.record, devices[0])
        try:
            with borrow(model, f"training {job.id}", control.wait) as process:
                workers = [self._worker(job.record, model, device) for device in devices[1:]]
                return self._train(job, model, process, workers, control, journal, on_event)
        except EngineDied:
            # A base that this job loaded is of no more use once its engine has died. A client's stays listed as failed.
            if model.id not in known:
                with suppress(LoadedModelNotFound):
                    self._peft.unload(model.id)
            raise

    def _check_data(self, job: RunningJob, control: RunControl, journal: RunJournal) -> None:
        """End a job that would learn nothing before its base is downloaded and loaded."""
        if journal.progress.step:
            return  # an earlier run has learned something
        running = job.patiently(lambda: self._analyses.begin_in_doubt(job.record))
        if running is None:
            return
        while not running.future.done():
            control.wait()
        require_learnable(job.record.dataset_id, job.record.config["max_seq_length"], running.future.result())

    def _find_or_load(self, job: JobRecord, device: str) -> LoadedModel:
        config = recorded(job.config)
        if job.loaded_model_id is not None:
            named = [model for model in self._peft.models() if model.id == job.loaded_model_id]
            # Another precision, an unloaded model or a dead engine: the base is loaded (again).
            for model in named:
                if model.state not in GONE and model.base.key.serves(config):
                    return model
        # With the named model's own options: another device or engine would round differently.
        options = job.load_options
        return self._peft.load(
            ConfiguredLoad(
                model_id=job.model_id,
                revision=job.revision,
                algorithm=Algorithm(job.algorithm),
                config=config,
                engine=options.engine if options is not None else "auto",
                device=options.device if options is not None else device,
                force=(options is not None and options.force) or job.progress.forced,
                allow_pickle=options is not None and options.allow_pickle,
            )
        )

    def _worker(self, job: JobRecord, model: LoadedModel, name: str) -> str:
        """Make room on a further GPU; return what an engine calls it."""
        device = self._peft.device(int(name))
        if not job.progress.forced:
            self._peft.make_room_for_worker(model.model_id, model.revision, recorded(job.config), device)
        return device.gpu_uuid or name

    def _train(
        self,
        job: RunningJob,
        model: LoadedModel,
        process: EngineProcess,
        workers: list[str],
        control: RunControl,
        journal: RunJournal,
        on_event: Callable[[protocol.RunEvent], None],
    ) -> Trained:
        record = job.record
        adapter_id = f"adp_{record.id.removeprefix('job_')}"
        validation = record.validation_dataset_id
        rows = job.patiently(lambda: str(self._datasets.rows_path(record.dataset_id)))
        held_out = job.patiently(lambda: str(self._datasets.rows_path(validation))) if validation else None
        about = job.patiently(lambda: about_run(self._datasets, record))
        initial = job.patiently(lambda: self._folder_of(record.initial_adapter_id))

        command = protocol.Train(
            adapter_id=adapter_id,
            config=recorded(record.config),
            dataset_path=rows,
            validation_path=held_out,
            validation_fraction=record.validation_fraction,
            output_path=str(self._adapters.path_for(adapter_id)),
            base_model_id=model.model_id,
            base_revision=model.revision,
            checkpoints_path=str(self._checkpoints.folder_of(record.id)),
            max_checkpoint_bytes=self._max_checkpoint_bytes,
            recorded_step=journal.progress.recorded_step,
            about=about,
            hands_out=journal.progress.hands_out,
            workers=workers,
            initial_adapter_path=initial,
        )
        engine = EngineUsed(name=model.base.key.engine, reason=model.base.wanted.engine_reason, computation=None)
        journal.progress = journal.progress.on_engine(engine)  # written with the next event
        figures = control.request(process, command, on_event).result()
        model.base.attached(adapter_id, figures.memory_bytes)
        return Trained(model, adapter_id, command.output_path, about.dataset_sha256, figures, process.log_tail())

    def _folder_of(self, adapter_id: str | None) -> str | None:
        """Return the folder of the adapter that a job continues, after a check of its files."""
        return self._adapters.verified(adapter_id).path if adapter_id is not None else None

    def savings(self, job: JobRecord, device: str) -> list[str]:
        """Name settings that would need less memory, and how much less; none where the model's layers are not known."""
        engine = job.progress.engine
        return self._peft.savings(
            job.model_id,
            job.revision,
            recorded(job.config),
            on_gpu=device != "cpu",
            on_unsloth=engine is not None and engine.name == "unsloth",
        )
