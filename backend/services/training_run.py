"""One job from the queue to its end: loads the base, trains, records the adapter, explains a failure."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.clock import Clock
from core.errors import StudioError
from domain import protocol
from domain.algorithms import Algorithm
from domain.job_states import JobState
from domain.peft_config import PeftConfig
from services.adapter_service import AdapterService
from services.dataset_service import DatasetService
from services.engine_process import CommandFailed, EngineDied, EngineProcess
from services.loaded_base import LoadState
from services.peft_service import LoadedModel, LoadRequest, PeftService
from store.records import AdapterRecord, JobRecord, to_text

if TYPE_CHECKING:
    from services.training_service import TrainingService

_POLL_S = 0.2


class RunEnded(Exception):
    """The run is over."""


class TrainingRun:
    """Carries one job through its states. `cancel` and `interrupt` may come from any thread."""

    def __init__(
        self,
        service: "TrainingService",
        datasets: DatasetService,
        adapters: AdapterService,
        peft: PeftService,
        clock: Clock,
        job: JobRecord,
    ) -> None:
        self._service, self._datasets, self._adapters = service, datasets, adapters
        self._peft, self._clock = peft, clock
        self.job = job
        self._stop = threading.Event()
        self._interrupted = False
        self._process: EngineProcess | None = None
        self._request_id: str | None = None
        self._lock = threading.Lock()
        self._last_step: protocol.StepMetrics | None = None

    def execute(self) -> None:
        """Run the job to a final state, or to `interrupted`."""
        now = to_text(self._clock.now())
        self._move(JobState.PREPARING, started_at=now, attempts=self.job.attempts + 1, error=None)
        try:
            model = self._loaded_model()
            with self._peft.lent(model, f"training {self.job.id}") as process:
                result = self._train(model, process)
            self._succeed(model, result)
        except CommandFailed as error:
            if error.extras["error_class"] == "cancelled":
                self._end_early()
            self._fail(error.extras["error_class"], error, JobState.FAILED)
        except EngineDied as error:
            if self._stop.is_set():
                self._end_early()
            self._fail(_death_class(error), error, JobState.INTERRUPTED)
        except StudioError as error:
            self._fail(error.slug.replace("-", "_"), error, JobState.FAILED)

    def _loaded_model(self) -> LoadedModel:
        """Return the base to train on, loaded; wait for it if it is still loading."""
        model = self._find_or_load()
        while not model.base.settled:
            if self._stop.wait(_POLL_S):
                self._end_early()
        if model.base.state is LoadState.FAILED and model.base.error is not None:
            raise model.base.error
        return model

    def _find_or_load(self) -> LoadedModel:
        config = PeftConfig.model_validate(self.job.config)
        if self.job.loaded_model_id is not None:
            named = [model for model in self._peft.models() if model.id == self.job.loaded_model_id]
            # Another precision, an unloaded model or a dead engine: the base is loaded (again).
            for model in named:
                key = model.base.key
                usable = model.state not in (LoadState.FAILED, LoadState.UNLOADING)
                if usable and (key.quantization, key.precision) == (config.quantization, config.precision):
                    return model
        return self._peft.load(
            LoadRequest(
                model_id=self.job.model_id,
                revision=self.job.revision,
                algorithm=Algorithm(self.job.algorithm),
                use_case=None,
                overrides=config.model_dump(),
                engine="auto",
                device="auto",
                force=False,
            )
        )

    def _train(self, model: LoadedModel, process: EngineProcess) -> dict[str, Any]:
        adapter_id = f"adp_{self.job.id.removeprefix('job_')}"
        validation = self.job.validation_dataset_id
        # The job's own configuration, in which every parameter is set.
        config = PeftConfig.model_validate(self.job.config)

        def command(request_id: str) -> protocol.Train:
            self._request_id = request_id
            return protocol.Train(
                request_id=request_id,
                adapter_id=adapter_id,
                config=config,
                dataset_path=str(self._datasets.rows_path(self.job.dataset_id)),
                validation_path=str(self._datasets.rows_path(validation)) if validation else None,
                validation_fraction=self.job.validation_fraction,
                output_path=str(self._adapters.path_for(adapter_id)),
                base_model_id=model.model_id,
                base_revision=model.revision,
            )

        with self._lock:
            if self._stop.is_set():
                self._end_early()
            self._process = process
            _, future = process.request(command, self._on_event)
        result = future.result()
        model.base.attached(adapter_id, result["memory_bytes"])
        return result | {"adapter_id": adapter_id, "log_tail": process.log_tail()}

    def _on_event(self, event: Any) -> None:
        data = event.model_dump(mode="json", exclude={"request_id", "kind"})
        if isinstance(event, protocol.TrainingStarted):
            self._move(JobState.RUNNING)
            self._service.record_event(self.job.id, "started", data, {"step": 0, "total_steps": event.total_steps})
        elif isinstance(event, protocol.StepMetrics):
            self._last_step = event
            progress = {
                "step": event.step,
                "total_steps": event.total_steps,
                "epoch": event.epoch,
                "fraction": event.step / event.total_steps,
                "eta_s": event.eta_s,
                "tokens_per_s": event.tokens_per_s,
                "last": data,
            }
            self._service.record_event(self.job.id, "metrics", data, progress)
        elif isinstance(event, protocol.Evaluated):
            self._service.record_event(self.job.id, "evaluation", data, None)
        else:
            self._service.record_event(self.job.id, "progress", data, None)

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
            dataset_sha256=self._datasets.get(self.job.dataset_id).sha256,
            metrics=figures,
            path=str(Path(result["path"])),
            created_at=now,
        )
        kept = figures | {"log_tail": result["log_tail"]}
        self._move(JobState.SUCCEEDED, adapter=adapter, adapter_id=adapter.id, result=kept, finished_at=now)

    def _fail(self, error_class: str, error: StudioError, state: JobState) -> None:
        extras = error.extras
        details = {
            "class": error_class,
            "message": error.detail,
            "exit_code": extras.get("exit_code"),
            "signal": extras.get("signal"),
            "log_tail": extras.get("log_tail", []),
            "suggestions": extras.get("suggestions", []),
        }
        finished = to_text(self._clock.now()) if state is JobState.FAILED else None
        self._move(state, error=details, finished_at=finished)

    def fail_unexpectedly(self) -> None:
        """Record an error of the server's own; the traceback is in its log."""
        self._fail("server", StudioError("The server failed while it ran the job; its log says why."), JobState.FAILED)

    def _end_early(self) -> None:
        """Record why the run was stopped, and leave."""
        if self._interrupted:
            error = StudioError("The server was stopped while the job ran; resume starts it again.")
            self._fail("server_ended", error, JobState.INTERRUPTED)
        else:
            self._move(JobState.CANCELLED, finished_at=to_text(self._clock.now()))
        raise RunEnded

    def cancel(self) -> None:
        """Stop the run; it ends as cancelled."""
        with self._lock:
            self._stop.set()
            process, request_id = self._process, self._request_id
        if process is not None and request_id is not None:
            process.stop(request_id)

    def interrupt(self) -> None:
        """Stop the run because the server ends; it ends as interrupted."""
        self._interrupted = True
        self.cancel()

    def log_tail(self) -> list[str]:
        """Return the engine's last lines."""
        return self._process.log_tail() if self._process is not None else []

    def _move(self, following: JobState, adapter: AdapterRecord | None = None, **columns: Any) -> None:
        if self._service.move(self.job, following, adapter=adapter, **columns):
            self.job = replace(self.job, state=following)
        else:
            raise RunEnded  # cancelled while it was queued


def _death_class(error: EngineDied) -> str:
    # The kernel's out-of-memory killer sends SIGKILL; so does a person. The message says no more than that.
    return "engine_killed" if error.extras.get("signal") == 9 else "engine_crash"
