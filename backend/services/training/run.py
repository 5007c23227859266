"""One job from the queue to its end: loads the base, trains, records the adapter, explains a failure."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from core import telemetry
from core.clock import Clock
from core.errors import DatabaseUnavailable, JobNotFound, LoadedModelNotFound, ModelBusy, StorageFull, StudioError
from core.logging import get_logger
from domain import protocol
from domain.jobs.failures import failure
from domain.jobs.retries import MAX_STALLS, TRANSIENT, wait_s
from domain.jobs.states import ACTIVE_STATES, JobState, may_change
from domain.peft.algorithms import Algorithm
from domain.peft.config import recorded
from services.engines.process import CommandFailed, EngineDied, EngineProcess, death_class
from services.loading.loaded_base import LoadState
from services.peft_service import LoadedModel, LoadRequest
from services.training.dataset_analysis import require_learnable
from services.training.run_card import about_run
from store.records import AdapterRecord, JobRecord, to_text

if TYPE_CHECKING:
    from services.training_service import TrainingService

T = TypeVar("T")
_POLL_S = 0.2
_SAVE_AGAIN_S = 1.0
_log = get_logger(__name__)
# What a database that cannot be written, for now, raises.
_NOT_SAVED = (DatabaseUnavailable, StorageFull)
# Steps that wait for a database that is away; with more, the run is paused.
_MOST_UNSAVED = 1000
# Why a run ends before its last step: a client's wish, the server's end, or a database that cannot be written.
Ending = Literal["discard", "keep_checkpoints", "keep_adapter", "pause", "server_ends", "not_saved"]
ENDINGS: dict[str, Ending] = {"nothing": "discard", "checkpoints": "keep_checkpoints", "adapter": "keep_adapter"}
_RANK: dict[Ending, int] = {
    "not_saved": 0,
    "server_ends": 1,
    "pause": 2,
    "keep_adapter": 3,
    "keep_checkpoints": 4,
    "discard": 5,
}
_ENGINE_MODES: dict[Ending, protocol.StopMode] = {"discard": "discard", "keep_adapter": "keep"}


class RunEnded(Exception):
    """The run is over."""


class TrainingRun:
    """Carries one job through its states. `end` may come from any thread."""

    def __init__(self, service: "TrainingService", clock: Clock, job: JobRecord, device: str) -> None:
        self._service, self._clock, self._device = service, clock, device
        self.job = job
        self._ending: Ending | None = None
        self._stop = threading.Event()
        self._process: EngineProcess | None = None
        self._request_id: str | None = None
        self._lock = threading.RLock()
        self._started = False
        self._unsaved: deque[tuple[str, dict[str, Any], dict[str, Any]]] = deque()
        self._unsaved_because: StudioError | None = None
        self._progress = dict(job.progress)
        self._stalls = job.stalls
        self._newest_event = 0
        self._oom_kills = service.oom_kills()

    def begin(self) -> None:
        """Take the job from the queue.

        Raises:
            RunEnded: It is not in the queue any more.
        """
        now = self._clock.now()
        started = self.job.started_at or to_text(now)
        # Patiently: a database that went away may have it as taken, and then nobody else would run it.
        self._finish(JobState.PREPARING, started_at=started, attempts=self.job.attempts + 1, error=None)
        # As it is now: another run of it may have ended since it was read.
        self.job = self._patiently(lambda: self._service.get(self.job.id))
        self._newest_event = self._patiently(lambda: self._service.newest_event(self.job.id))
        self._progress, self._stalls = dict(self.job.progress), self.job.stalls
        if self.job.attempts == 1:
            waited = now - datetime.fromisoformat(self.job.created_at)
            telemetry.job_queue_seconds.observe(max(0.0, waited.total_seconds()))

    def execute(self) -> None:
        """Run the job that `begin` took to a final state, or to `paused` or `interrupted`."""
        try:
            if self.job.cancel_wish is not None:  # of a run before, which ended before it could obey
                self.end(ENDINGS[self.job.cancel_wish])
                self._end_early()
            model, result = self._work()
            self._save_events()
            self._succeed(model, result)
        except CommandFailed as error:
            error_class = error.extras["error_class"]
            if error_class in ("cancelled", "paused"):
                self._end_early()
            self._fail(error_class, error)
        except EngineDied as error:
            if self._stop.is_set():
                self._end_early()
            self._fail(self._death_class(error), error)
        except StorageFull as error:
            self._fail("disk_full", error)
        except StudioError as error:
            self._fail(error.slug.replace("-", "_"), error)

    def _work(self) -> tuple[LoadedModel, dict[str, Any]]:
        self._check_data()
        known = {model.id for model in self._service.peft.models()}
        model = self._find_or_load()
        try:
            with model.base.awaited():
                self._wait_for(model)
                with self._borrowed(model) as process:
                    return model, self._train(model, process)
        except EngineDied:
            # What this job loaded and lost is of no use to anybody; what a client loaded stays listed as failed.
            if model.id not in known:
                with suppress(LoadedModelNotFound):
                    self._service.peft.unload(model.id)
            raise

    def _check_data(self) -> None:
        """End a job that would learn nothing before its base is downloaded and loaded."""
        if self._progress.get("step"):
            return  # it has learned something
        running = self._patiently(lambda: self._service.analyses.begin_in_doubt(self.job))
        if running is None:
            return
        while not running.future.done():
            if self._stop.wait(_POLL_S):
                self._end_early()
        require_learnable(self.job.dataset_id, self.job.config["max_seq_length"], running.future.result())

    def _wait_for(self, model: LoadedModel) -> None:
        while not model.base.settled:
            if self._stop.wait(_POLL_S):
                self._end_early()
        if model.base.state is LoadState.FAILED and model.base.error is not None:
            raise model.base.error

    def _find_or_load(self) -> LoadedModel:
        config = recorded(self.job.config)
        if self.job.loaded_model_id is not None:
            named = [model for model in self._service.peft.models() if model.id == self.job.loaded_model_id]
            # Another precision, an unloaded model or a dead engine: the base is loaded (again).
            for model in named:
                usable = model.state not in (LoadState.FAILED, LoadState.UNLOADING)
                if usable and model.base.key.serves(config):
                    return model
        # As the client had the named model loaded: another device or engine would round otherwise.
        options = self.job.load_options
        return self._service.peft.load(
            LoadRequest(
                model_id=self.job.model_id,
                revision=self.job.revision,
                algorithm=Algorithm(self.job.algorithm),
                use_case=None,
                overrides=config.model_dump(exclude={"epochs"} if config.max_steps is not None else None),
                engine=options.get("engine", "auto"),
                device=options.get("device", self._device),
                force=bool(options.get("force") or self.job.progress.get("forced")),
                allow_pickle=options.get("allow_pickle", False),
                for_job=True,
            )
        )

    @contextmanager
    def _borrowed(self, model: LoadedModel) -> Iterator[EngineProcess]:
        """Hold the base; wait while something else does."""
        while True:
            try:
                lent = self._service.peft.lent(model, f"training {self.job.id}")
                process = lent.__enter__()
                break
            except ModelBusy:
                if self._stop.wait(_POLL_S):
                    self._end_early()
        try:
            yield process
        finally:
            lent.__exit__(None, None, None)

    def _train(self, model: LoadedModel, process: EngineProcess) -> dict[str, Any]:
        service, job = self._service, self.job
        adapter_id = f"adp_{job.id.removeprefix('job_')}"
        validation = job.validation_dataset_id
        rows = self._patiently(lambda: str(service.datasets.rows_path(job.dataset_id)))
        held_out = self._patiently(lambda: str(service.datasets.rows_path(validation))) if validation else None
        about = self._patiently(lambda: about_run(service.datasets, job))

        def command(request_id: str) -> protocol.Train:
            self._request_id = request_id
            return protocol.Train(
                request_id=request_id,
                adapter_id=adapter_id,
                config=recorded(job.config),
                dataset_path=rows,
                validation_path=held_out,
                validation_fraction=job.validation_fraction,
                output_path=str(service.adapters.path_for(adapter_id)),
                base_model_id=model.model_id,
                base_revision=model.revision,
                checkpoints_path=str(service.checkpoints.folder_of(job.id)),
                max_checkpoint_bytes=service.max_checkpoint_bytes,
                recorded_step=self._progress.get("recorded_step", 0),
                about=about,
            )

        engine = {"name": model.base.key.engine, "reason": model.base.engine_reason, "computation": None}
        self._progress |= {"engine": engine}  # written with the next event
        with self._lock:
            if self._stop.is_set():
                self._end_early()
            self._process = process
            _, future = process.request(command, self._on_event)
        result = future.result()
        model.base.attached(adapter_id, result["memory_bytes"])
        return result | {"adapter_id": adapter_id, "log_tail": process.log_tail()}

    # Events

    def _on_event(self, event: Any) -> None:
        """Record an event. Steps trained again after a crash are the same steps: they are not recorded twice."""
        data = event.model_dump(mode="json", exclude={"request_id", "kind"})
        if isinstance(event, protocol.TrainingStarted):
            self._started = True
            step = event.resumed_from_step or 0
            self._save("started", data, {"step": step, "total_steps": event.total_steps})
        elif isinstance(event, protocol.TrainingBuilt):
            self._save("built", data, {})
        elif isinstance(event, protocol.Computing):
            self._save(None, {}, {"engine": self._progress["engine"] | {"computation": event.how}})
        elif isinstance(event, protocol.StepMetrics):
            self._oom_kills = self._service.oom_kills()  # a kill before this step was another's
            telemetry.step_seconds.labels(self.job.algorithm).observe(event.step_s)
            telemetry.tokens.labels(self.job.algorithm).inc(event.step_tokens)
            new = event.step > self._progress.get("recorded_step", 0)
            progress = {
                "step": event.step,
                "recorded_step": max(event.step, self._progress.get("recorded_step", 0)),
                "total_steps": event.total_steps,
                "epoch": event.epoch,
                "fraction": event.step / event.total_steps,
                "eta_s": event.eta_s,
                "tokens_per_s": event.tokens_per_s,
                "last": data,
            }
            self._save("metrics" if new else None, data, progress)
        elif isinstance(event, protocol.Evaluated):
            new = event.step > self._progress.get("evaluated_step", -1)
            step = max(event.step, self._progress.get("evaluated_step", -1))
            self._save("evaluation" if new else None, data, {"evaluated_step": step})
        elif isinstance(event, protocol.CheckpointWritten):
            if event.step > self._progress.get("checkpoint_step", -1):
                self._stalls = 0
            step = max(event.step, self._progress.get("checkpoint_step", -1))
            data = {"step": event.step, "size_bytes": event.size_bytes}
            self._save("checkpoint", data, {"checkpoint_step": step})
        else:
            self._save("progress", data, {})

    def _save(self, kind: str | None, data: dict[str, Any], progress: dict[str, Any]) -> None:
        """Write an event and the progress. What a database that is away cannot take waits; a full disk pauses."""
        self._progress |= progress
        self._unsaved.append((kind or "", data, dict(self._progress)))
        try:
            self._flush()
        except _NOT_SAVED as error:
            _log.warning("job.event_waits", job_id=self.job.id, event_kind=kind, unsaved=len(self._unsaved))
            if isinstance(error, StorageFull) or len(self._unsaved) > _MOST_UNSAVED:
                self._unsaved_because = error
                self.end("not_saved")

    def _flush(self) -> None:
        with self._lock:
            if self._started and self.job.state is JobState.PREPARING:  # and not, for one, pausing
                self._move(JobState.RUNNING)
        while self._unsaved:
            kind, data, progress = self._unsaved[0]
            try:
                self._newest_event = self._service.record_event(
                    self.job.id, kind or None, data, progress, self._stalls, after=self._newest_event
                )
            except SQLAlchemyError:  # and no outage: this one can never be written, and must not hold up the others
                _log.exception("job.event_lost", job_id=self.job.id, event_kind=kind)
            self._unsaved.popleft()

    def _save_events(self) -> None:
        """Write what could not be written before."""
        self._patiently(self._flush)

    def _patiently(self, use: Callable[[], T]) -> T:
        """Use the database; try until it answers, or the server ends."""
        while True:
            try:
                return use()
            except _NOT_SAVED:
                if self._service.closing.wait(_SAVE_AGAIN_S):
                    raise RunEnded from None  # the database says `running`: the next start resumes it

    # Ends

    def _succeed(self, model: LoadedModel, result: dict[str, Any]) -> None:
        now = to_text(self._clock.now())
        figures = {key: value for key, value in result.items() if key not in ("path", "log_tail", "adapter_id")}
        adapter = AdapterRecord(
            id=result["adapter_id"],
            name=self.job.name,
            base_model_id=model.model_id,
            base_revision=model.revision,
            algorithm=self.job.algorithm,
            config=self.job.config,
            job_id=self.job.id,
            dataset_sha256=self._patiently(lambda: self._service.datasets.get(self.job.dataset_id).sha256),
            metrics=figures,
            path=str(Path(result["path"])),
            created_at=now,
            version=0,  # given when it is stored
            source={"kind": "training", "job_id": self.job.id},
        )
        kept = figures | {"log_tail": result["log_tail"]}
        state = JobState.CANCELLED if result["stopped_on_request"] else JobState.SUCCEEDED
        self._finish(state, adapter=adapter, adapter_id=adapter.id, result=kept, finished_at=now)

    def _fail(self, error_class: str, error: StudioError) -> None:
        """Record what went wrong: to be tried again, to be looked at by a person, or for good."""
        self._save_events()
        if self._stop.is_set() and (error_class == "disk_full" or error_class in TRANSIENT):
            self._end_early()  # it was to end anyway
        telemetry.job_interruptions.labels(error_class).inc()
        details = failure(error_class, error)
        if error_class in ("out_of_memory", "out_of_host_memory"):
            config = recorded(self.job.config)
            on_gpu = self._device != "cpu"
            saving = self._service.peft.savings(self.job.model_id, self.job.revision, config, on_gpu=on_gpu)
            details["suggestions"] = saving or details["suggestions"]
        if error_class == "disk_full":
            self._finish(JobState.PAUSED, error=details)
            return
        stalls = self._stalls + 1
        if error_class in TRANSIENT and stalls < MAX_STALLS:
            wait = max(wait_s(self._stalls), error.extras.get("retry_after_s") or 0.0)
            self._service.retry_after(self.job.id, wait)
            self._finish(JobState.INTERRUPTED, error=details, stalls=stalls)
            return
        if error_class in TRANSIENT:
            details["message"] += f" This was the {MAX_STALLS}th time in a row without a checkpoint in between."
        self._finish(JobState.FAILED, error=details, stalls=stalls, finished_at=to_text(self._clock.now()))

    def fail_unexpectedly(self) -> None:
        """Record an error of the server's own; the traceback is in its log."""
        self._fail("server", StudioError("The server failed while it ran the job; its log says why."))

    def _end_early(self) -> None:
        """Record why the run was stopped, and leave."""
        self._save_events()
        if self._ending == "pause":
            self._finish(JobState.PAUSED)
        elif self._ending == "not_saved" and self._unsaved_because is not None:
            because = self._unsaved_because
            error_class = "disk_full" if isinstance(because, StorageFull) else "database_unavailable"
            self._finish(JobState.PAUSED, error=failure(error_class, because))
        elif self._ending == "server_ends":
            ended = StudioError("The server was stopped while the job ran; it goes on when the server starts.")
            self._finish(JobState.INTERRUPTED, error=failure("server_ended", ended))
        else:
            self._finish(JobState.CANCELLED, finished_at=to_text(self._clock.now()))
            if self._ending == "discard":
                self._service.checkpoints.delete(self.job.id)
        raise RunEnded

    def end(self, ending: Ending) -> None:
        """Stop the run before its last step. A cancel overrules a pause, and a pause what the server wants.

        Raises:
            TransitionNotPermitted: A pause is wanted of a job that is neither preparing nor running.
        """
        with self._lock:
            if ending == "pause" and self.job.state is not JobState.PAUSING:
                self._move(JobState.PAUSING)
            if self._ending is None or _RANK[ending] > _RANK[self._ending]:
                self._ending = ending
            self._stop.set()
            process, request_id = self._process, self._request_id
        if process is not None and request_id is not None:
            process.stop(request_id, _ENGINE_MODES.get(self._ending, "pause"))

    def write_checkpoint(self) -> bool:
        """Ask for a checkpoint after the step under way; False if nothing is training yet."""
        process, request_id = self._process, self._request_id
        if process is None or request_id is None or self.job.state is not JobState.RUNNING:
            return False
        process.write_checkpoint(request_id)
        return True

    def log_tail(self) -> list[str]:
        """Return the engine's last lines."""
        return self._process.log_tail() if self._process is not None else []

    def _finish(self, following: JobState, adapter: AdapterRecord | None = None, **columns: Any) -> None:
        self._patiently(lambda: self._move(following, adapter, **columns))

    def _move(self, following: JobState, adapter: AdapterRecord | None = None, **columns: Any) -> None:
        with self._lock:
            while not self._service.move(self.job, following, adapter=adapter, **columns):
                # Others move it while it is queued; from then on this run alone, whose last move may have gone
                # through although the database went away before it said so.
                try:
                    found = self._service.get(self.job.id)
                except JobNotFound:
                    raise RunEnded from None
                if found.state is following:
                    break
                if found.state not in ACTIVE_STATES or not may_change(found.state, following):
                    raise RunEnded
                self.job = replace(self.job, state=found.state)
            self.job = replace(self.job, state=following)

    def _death_class(self, error: EngineDied) -> str:
        return death_class(error, out_of_memory=self._service.oom_kills() > self._oom_kills)
