"""Training jobs: accepted, queued, run one at a time, followed event by event."""

import hashlib
import json
import threading
import uuid
from dataclasses import dataclass
from typing import Any

from core.broadcast import Broadcast
from core.clock import Clock, SystemClock
from core.errors import Conflict, JobNotFound, SettingRejected, TransitionNotPermitted
from core.logging import get_logger
from core.singleton import singleton
from domain.algorithms import SPECS, Algorithm
from domain.configure import Configuration
from domain.job_states import ACTIVE_STATES, FINAL_STATES, JobState, may_change
from domain.use_cases import UseCaseId
from services.adapter_service import AdapterService, get_adapter_service
from services.database import get_database
from services.dataset_service import DatasetService, get_dataset_service
from services.peft_service import PeftService, get_peft_service
from services.training_run import RunEnded, TrainingRun
from store.database import Database
from store.records import AdapterRecord, EventRecord, JobRecord, to_text
from store.repositories import Adapters, Jobs

_log = get_logger(__name__)


class IdempotencyKeyReused(Conflict):
    """The key was used before, with another request."""

    slug, title = "idempotency-key-reused", "Idempotency key reused"


@dataclass(frozen=True)
class JobRequest:
    """What a client wants trained."""

    model_id: str | None
    loaded_model_id: str | None
    revision: str | None
    dataset_id: str
    validation_dataset_id: str | None
    validation_fraction: float
    use_case: UseCaseId | None
    algorithm: Algorithm
    overrides: dict[str, Any]
    name: str | None
    priority: int
    idempotency_key: str | None


class TrainingService:
    """Keeps the queue and runs its jobs, one after the other, on a thread of its own."""

    def __init__(
        self,
        database: Database,
        datasets: DatasetService,
        adapters: AdapterService,
        peft: PeftService,
        clock: Clock,
    ) -> None:
        self._database, self._datasets, self._adapters = database, datasets, adapters
        self._peft, self._clock = peft, clock
        self.broadcast = Broadcast()
        self._wake = threading.Condition()
        self._closed = False
        self._running: TrainingRun | None = None
        self._worker: threading.Thread | None = None

    # Accepting

    def create(self, request: JobRequest) -> JobRecord:
        """Accept a job.

        Raises:
            SettingRejected: A setting cannot take effect.
            DatasetNotFound, ModelNotFound, LoadedModelNotFound: What it names does not exist.
            IdempotencyKeyReused: The key belongs to another request.
        """
        digest = hashlib.sha256(json.dumps(request.__dict__, sort_keys=True, default=str).encode()).hexdigest()
        with self._database.begin() as connection:
            earlier = _earlier(Jobs(connection), request, digest)
        if earlier is not None:
            return earlier
        model_id, revision = self._model_of(request)
        configuration = self._configure(request, model_id, revision)
        self._check_data(request, configuration.config.early_stopping_patience, configuration.config.eval_every_steps)
        job_id = f"job_{uuid.uuid4().hex[:12]}"
        now = to_text(self._clock.now())
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            # Again, now that nobody else can write: the same request may have come meanwhile.
            earlier = _earlier(jobs, request, digest)
            if earlier is not None:
                return earlier
            record = JobRecord(
                id=job_id,
                sequence=jobs.next_sequence(),
                name=request.name or f"{request.algorithm.value} on {model_id.rsplit('/', 1)[-1]}",
                state=JobState.QUEUED,
                priority=request.priority,
                idempotency_key=request.idempotency_key,
                request_sha256=digest,
                model_id=model_id,
                revision=revision,
                loaded_model_id=request.loaded_model_id,
                algorithm=request.algorithm.value,
                config=configuration.config.model_dump(mode="json"),
                dataset_id=request.dataset_id,
                validation_dataset_id=request.validation_dataset_id,
                validation_fraction=request.validation_fraction,
                progress={},
                result={},
                attempts=0,
                adapter_id=None,
                error=None,
                created_at=now,
                started_at=None,
                finished_at=None,
            )
            jobs.add(record)
            jobs.append_event(job_id, "state", {"state": JobState.QUEUED.value}, now)
        self._notify(job_id)
        return record

    def _configure(self, request: JobRequest, model_id: str, revision: str | None) -> Configuration:
        """Configure for the base that will be trained on: a loaded one is taken as it was loaded, or refused."""
        loaded = self._peft.get(request.loaded_model_id) if request.loaded_model_id is not None else None
        device = self._peft.device_of(loaded) if loaded is not None else None
        overrides = dict(request.overrides)
        if loaded is not None:
            for name in ("quantization", "precision"):
                have = getattr(loaded.base.key, name)
                wanted = overrides.get(name, SPECS[request.algorithm].fixed.get(name, have))
                if wanted != have:
                    raise _rejected(
                        name, f"the loaded model has {name}={have!r}, the job needs {wanted!r}; load another"
                    )
                overrides[name] = have
        return self._peft.configure(
            request.algorithm, request.use_case, overrides, model_id=model_id, revision=revision, device=device
        )

    def _model_of(self, request: JobRequest) -> tuple[str, str | None]:
        if request.loaded_model_id is None:
            if request.model_id is None:
                raise _rejected("model_id", "name a model_id or a loaded_model_id")
            return request.model_id, request.revision
        loaded = self._peft.get(request.loaded_model_id)
        if request.model_id is not None and request.model_id != loaded.model_id:
            raise _rejected("model_id", f"the loaded model is {loaded.model_id}; leave model_id out")
        return loaded.model_id, loaded.revision

    def _check_data(self, request: JobRequest, patience: int | None, every: int | None) -> None:
        self._datasets.get(request.dataset_id)
        if request.validation_dataset_id is not None:
            self._datasets.get(request.validation_dataset_id)
            if request.validation_fraction > 0:
                raise _rejected("validation_fraction", "use it or validation_dataset_id, not both")
        has_validation = request.validation_dataset_id is not None or request.validation_fraction > 0
        for name, value in (("early_stopping_patience", patience), ("eval_every_steps", every)):
            if value is not None and not has_validation:
                raise _rejected(name, "needs validation_dataset_id or validation_fraction")

    # Reading

    def get(self, job_id: str) -> JobRecord:
        """Return one job.

        Raises:
            JobNotFound: There is none of that id.
        """
        with self._database.begin() as connection:
            record = Jobs(connection).get(job_id)
        if record is None:
            raise JobNotFound(f"No training job has the id {job_id}.")
        return record

    def all(self, states: frozenset[JobState] | None = None) -> list[JobRecord]:
        """Return jobs, newest first."""
        with self._database.begin() as connection:
            return Jobs(connection).all(states)

    def events(self, job_id: str, after: int, limit: int, kind: str | None = None) -> list[EventRecord]:
        """Return events with a sequence number above `after`, in order."""
        with self._database.begin() as connection:
            return Jobs(connection).events(job_id, after, limit, kind)

    def log_tail(self, job_id: str, lines: int) -> list[str]:
        """Return the last lines of the engine that trains or trained the job, as far as they are known."""
        record = self.get(job_id)
        run = self._running
        if run is not None and run.job.id == job_id:
            return run.log_tail()[-lines:]
        kept: list[str] = (record.error or {}).get("log_tail", record.result.get("log_tail", []))
        return kept[-lines:]

    # Steering

    def cancel(self, job_id: str) -> JobRecord:
        """End a job. A queued one is cancelled at once; a running one as soon as its engine sees it.

        Raises:
            TransitionNotPermitted: It has ended already.
        """
        record = self.get(job_id)
        if record.state in FINAL_STATES:
            raise TransitionNotPermitted(f"The job is {record.state.value}; it cannot be cancelled any more.")
        if record.state in ACTIVE_STATES:
            run = self._running
            if run is not None and run.job.id == job_id:
                run.cancel()
                return self.get(job_id)
        if not self.move(record, JobState.CANCELLED, finished_at=to_text(self._clock.now())):
            return self.cancel(job_id)  # it moved on in between: look again
        return self.get(job_id)

    def resume(self, job_id: str) -> JobRecord:
        """Queue an interrupted job again; without checkpoints it starts from the base.

        Raises:
            TransitionNotPermitted: It was not interrupted.
        """
        record = self.get(job_id)
        if record.state is not JobState.INTERRUPTED:
            raise TransitionNotPermitted(f"The job is {record.state.value}; only an interrupted job can be resumed.")
        self.move(record, JobState.QUEUED, error=None, progress={}, started_at=None, finished_at=None)
        return self.get(job_id)

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended. Its adapter stays.

        Raises:
            TransitionNotPermitted: It has not ended.
        """
        record = self.get(job_id)
        if record.state not in FINAL_STATES:
            raise TransitionNotPermitted(f"The job is {record.state.value}; cancel it first.")
        with self._database.begin() as connection:
            Jobs(connection).delete(job_id)

    # Changing, for the run

    def move(
        self, record: JobRecord, following: JobState, *, adapter: AdapterRecord | None = None, **columns: Any
    ) -> bool:
        """Change a job's state, write the event and record its adapter, in one transaction.

        Returns:
            Whether the job was still as given; if not, nothing was written.

        Raises:
            TransitionNotPermitted: The table of transitions does not allow it.
        """
        if not may_change(record.state, following):
            raise TransitionNotPermitted(f"A job cannot go from {record.state.value} to {following.value}.")
        now = to_text(self._clock.now())
        data: dict[str, Any] = {"state": following.value}
        data |= {name: columns[name] for name in ("error", "adapter_id") if columns.get(name) is not None}
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            changed = jobs.change_state(record.id, record.state, following, **columns)
            if changed:
                jobs.append_event(record.id, "state", data, now)
            if changed and adapter is not None:
                Adapters(connection).add(adapter)
        if changed:
            _log.info("job.state", job_id=record.id, state=following.value)
            self._notify(record.id)
        return changed

    def record_event(self, job_id: str, kind: str, data: dict[str, Any], progress: dict[str, Any] | None) -> None:
        """Write an event and, with it, the job's progress."""
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            jobs.append_event(job_id, kind, data, to_text(self._clock.now()))
            if progress is not None:
                jobs.set(job_id, progress=progress)
        self._notify(job_id)

    def _notify(self, job_id: str) -> None:
        self.broadcast.notify(job_id)
        with self._wake:
            self._wake.notify_all()

    # Running

    def start(self) -> None:
        """Mark what a former server left unfinished, and start working."""
        for record in self.all(ACTIVE_STATES):
            error = {
                "class": "server_ended",
                "message": "The server ended while the job ran; resume starts it again.",
                "exit_code": None,
                "signal": None,
                "log_tail": [],
                "suggestions": [f"POST /api/training/jobs/{record.id}/resume"],
            }
            self.move(record, JobState.INTERRUPTED, error=error)
        self._worker = threading.Thread(target=self._work, name="training", daemon=True)
        self._worker.start()

    def _work(self) -> None:
        while not self._closed:
            try:
                busy = self._work_once()
            except Exception:  # noqa: BLE001 - e.g. the disk is full: the log says so, and the next try may do better
                _log.exception("training.worker_failed")
                busy = False
            if not busy:
                with self._wake:
                    # Woken by every change; the time-out only covers a wake-up between the look and the wait.
                    self._wake.wait(timeout=1.0)

    def _work_once(self) -> bool:
        """Run the next queued job, if there is one; tell whether there was."""
        with self._database.begin() as connection:
            record = Jobs(connection).next_queued()
        if record is not None:
            self._guarded(record)
        return record is not None

    def _guarded(self, record: JobRecord) -> None:
        run = TrainingRun(self, self._datasets, self._adapters, self._peft, self._clock, record)
        self._running = run
        try:
            run.execute()
        except RunEnded:
            return
        except Exception:  # noqa: BLE001 - the worker lives on; the job says failed, the log why
            _log.exception("job.crashed", job_id=record.id)
            run.fail_unexpectedly()
        finally:
            self._running = None

    def close(self) -> None:
        """Stop working; a running job becomes `interrupted`."""
        self._closed = True
        run = self._running
        if run is not None:
            run.interrupt()
        with self._wake:
            self._wake.notify_all()
        if self._worker is not None:
            self._worker.join(timeout=15)


def _earlier(jobs: Jobs, request: JobRequest, digest: str) -> JobRecord | None:
    """Return the job of the same idempotency key.

    Raises:
        IdempotencyKeyReused: It was another request.
    """
    if request.idempotency_key is None:
        return None
    earlier = jobs.by_idempotency_key(request.idempotency_key)
    if earlier is not None and earlier.request_sha256 != digest:
        raise IdempotencyKeyReused(f"The idempotency key belongs to the job {earlier.id}.")
    return earlier


def _rejected(location: str, message: str) -> SettingRejected:
    return SettingRejected(f"{location}: {message}", errors=[{"location": [location], "message": message}])


@singleton
def get_training_service() -> TrainingService:
    """Return the process's training service."""
    return TrainingService(
        get_database(), get_dataset_service(), get_adapter_service(), get_peft_service(), SystemClock()
    )
