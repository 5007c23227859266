"""OpenAI's fine-tuning on this service's own jobs: requests in its terms, result files, and the files of both."""

import hashlib
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from core.clock import Clock, SystemClock
from core.errors import Conflict, JobNotFound, ModelNotFound, Rejected, SettingRejected
from core.settings import get_settings
from core.singleton import singleton
from domain.jobs.openai_request import OpenAIRequest
from domain.jobs.states import JobState
from domain.openai import fine_tunes, history
from domain.openai.files import FINE_TUNE, RESULTS, dataset_of_file, job_of_results, results_of_job
from domain.openai.fine_tunes import FineTuneWish
from domain.openai.names import is_fine_tuned, stands_for
from domain.peft.algorithms import Algorithm
from domain.peft.initial_adapter import InitialAdapter
from domain.peft.objectives import usual_settings
from domain.peft.use_cases import UseCaseId
from services.dataset_service import DatasetService, get_dataset_service
from services.file_service import FileNotFound, FileService, get_file_service
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from services.peft_service import PeftService, get_peft_service
from services.served_model_service import ServedModelService, get_served_model_service
from services.training.fine_tune_facts import facts_of
from services.training.initial_adapters import InitialAdapters, get_initial_adapters
from services.training.job_intake import JobRequest
from services.training_service import TrainingService, get_training_service
from store.records import FileRecord, JobRecord

_EVERY = 10**7  # events of one kind: more than any job has
_RESULT_NAME = "step_metrics.csv"  # as OpenAI's is called
_MOMENTS = timedelta(seconds=30)
_RETRIES = timedelta(minutes=15)  # the SDK waits ten minutes for an answer before it asks again


class FileRejected(Rejected):
    """The file cannot be trained on: its rows are bad, or it is for something else."""

    slug, title = "invalid-training-file", "Invalid training file"


class ResultFileKept(Conflict):
    """A result file is made from its job's metrics, and is there as long as the job."""

    slug, title = "result-file-kept", "Result file kept"


class FineTuningService:
    """Accepts fine-tunes in OpenAI's terms, and tells of every job in these.

    Args:
        names: The names that stand for local bases.
        clock: For what is expected, and for what came moments ago.
    """

    def __init__(
        self,
        training: TrainingService,
        files: FileService,
        datasets: DatasetService,
        peft: PeftService,
        registry: ModelRegistryService,
        served: ServedModelService,
        initial_adapters: InitialAdapters,
        names: tuple[tuple[str, str], ...],
        clock: Clock,
    ) -> None:
        self._training, self._files, self._datasets = training, files, datasets
        self._peft, self._registry, self._names, self._clock = peft, registry, names, clock
        self._served, self._initial_adapters = served, initial_adapters
        self._result_bytes: dict[str, int] = {}  # of the jobs that have succeeded, whose metrics change no more
        self._creating: set[str] = set()
        self._created = threading.Condition()

    # Accepting

    def create(self, wish: FineTuneWish, *, tried_again: bool) -> JobRecord:
        """Accept a fine-tune, or return the job of the same request that came moments ago.

        Args:
            tried_again: Whether the client says that it sends the request once more.

        Raises:
            FileNotFound: There is no such file.
            FileRejected: Its rows cannot be trained on, line by line.
            ModelNotFound: The name stands for no model here; the message says how to set it.
            StudioError: As TrainingService.create says, and as ServedModelService.adapter_of says of a checkpoint.
        """
        beginning = f"openai-{_digest(wish)}-"
        with self._one_at_a_time(beginning):
            earlier = self._training.ledger.newest_with_key(beginning)
            if earlier is not None and self._is_the_same(earlier, tried_again):
                return earlier
            return self._training.create(self._request(wish, beginning + uuid.uuid4().hex[:8]))

    @contextmanager
    def _one_at_a_time(self, key: str) -> Iterator[None]:
        """Let the second of two equal requests wait for the first."""
        with self._created:
            self._created.wait_for(lambda: key not in self._creating)
            self._creating.add(key)
        try:
            yield
        finally:
            with self._created:
                self._creating.discard(key)
                self._created.notify_all()

    def _is_the_same(self, earlier: JobRecord, tried_again: bool) -> bool:
        """Tell whether a request is that of an earlier job, sent once more; equal jobs make equal models anyway."""
        age = self._clock.now() - datetime.fromisoformat(earlier.created_at)
        if tried_again:
            return age < _RETRIES
        return age < _MOMENTS and earlier.state not in (JobState.FAILED, JobState.CANCELLED)

    def _request(self, wish: FineTuneWish, key: str) -> JobRequest:
        refused = fine_tunes.clashes(wish)
        if refused:
            errors = [{"location": [name], "message": why} for name, why in refused]
            raise SettingRejected("; ".join(f"{name}: {why}" for name, why in refused), errors=errors)
        initial = self._initial(wish)
        if initial is None:
            model_id, revision = self.base_of(wish.model), wish.own.revision
        else:
            named = self.base_of(wish.model) if not is_fine_tuned(wish.model) else None
            model_id, revision = initial.base_for(named, wish.own.revision)
        dataset_id = self._dataset(wish.training_file, "training_file")
        validation_id = self._dataset(wish.validation_file, "validation_file") if wish.validation_file else None
        own = wish.own
        usual = initial.algorithm if initial is not None else Algorithm.LORA
        algorithm = Algorithm(own.algorithm) if own.algorithm is not None else usual
        use_case = UseCaseId(own.use_case) if own.use_case is not None else None
        rows = self._datasets.get(dataset_id).rows
        overrides = fine_tunes.first_overrides(wish, rows)
        overrides = usual_settings(self._datasets.get(dataset_id).format) | overrides
        loaded = self._peft.get(own.loaded_model_id) if own.loaded_model_id is not None else None
        where = self._peft.on_device(model_id, revision, loaded=loaded)
        config = self._peft.configure(algorithm, use_case, overrides, where, initial).config
        return JobRequest(
            model_id=model_id if loaded is None else None,
            loaded_model_id=own.loaded_model_id,
            revision=revision,
            dataset_id=dataset_id,
            validation_dataset_id=validation_id,
            validation_fraction=own.validation_fraction,
            use_case=use_case,
            algorithm=algorithm,
            overrides=fine_tunes.with_the_rest(wish, overrides, config, rows),
            name=own.name or wish.suffix,
            priority=own.priority,
            resume_from=own.resume_from,
            initial_adapter_id=initial.id if initial is not None else None,
            idempotency_key=key,
            gpus=own.gpus,
            force=own.force,
            openai_request=OpenAIRequest(
                model=wish.model,
                suffix=wish.suffix,
                learning_rate_multiplier=wish.hyperparameters.learning_rate_multiplier,
                metadata=wish.metadata,
            ),
        )

    def _initial(self, wish: FineTuneWish) -> InitialAdapter | None:
        """Return the adapter that a fine-tune continues: of a fine-tuned model, or one that is named beside a base.

        Raises:
            ModelNotFound, AdapterNotFound: There is none of that name.
            SettingRejected: Both are named.
        """
        adapter_id = wish.own.initial_adapter_id
        if is_fine_tuned(wish.model):
            if adapter_id is not None:
                raise SettingRejected.of(
                    ("peft", "initial_adapter_id"), "the model is a fine-tuned one already; send one of them"
                )
            adapter_id = self._served.adapter_of(self._served.find(wish.model))
        return self._initial_adapters.get(adapter_id) if adapter_id is not None else None

    def base_of(self, name: str) -> str:
        """Return the model that a base's name stands for: by the settings, or the model of that id.

        Raises:
            ModelNotFound: It stands for none; the message says how to set it.
        """
        base = stands_for(name, self._names)
        if base is None and "/" not in name and self._registry.resolve_local(name) is None:
            raise ModelNotFound(
                f"{name} stands for no model here. Start the server with PEFT_STUDIO_MODEL_NAMES={name}=<model>, where "
                "<model> is one of GET /api/models/local or of the Hub, or send such an id as the model."
            )
        return base or name

    def _dataset(self, file_id: str, field: str) -> str:
        """Return the dataset of a file, once its rows are read."""
        record = self._files.get(file_id)
        reading = self._files.reading(file_id)
        if reading is not None:
            reading.exception()
            record = self._files.get(file_id)
        errors = [{"location": [field], "message": record.status_details}]
        if record.purpose != FINE_TUNE:
            raise FileRejected(f"{file_id} has the purpose {record.purpose}, not {FINE_TUNE}.", errors=errors)
        if record.status != "processed":
            raise FileRejected(f"{file_id} cannot be used: {record.status_details}", errors=errors)
        return dataset_of_file(file_id)

    # Reading

    def all(self, metadata: dict[str, str] | None, *, without: bool = False) -> list[JobRecord]:
        """Return jobs, newest first: all, those with such pairs, or those `without` any."""
        records = self._training.ledger.all()
        if without:
            return [record for record in records if not _metadata(record)]
        wanted = (metadata or {}).items()
        return [record for record in records if wanted <= _metadata(record).items()]

    def get(self, job_id: str) -> JobRecord:
        """Return one job.

        Raises:
            JobNotFound: There is none of that id.
        """
        return self._training.ledger.get(job_id)

    def body(self, record: JobRecord) -> dict[str, Any]:
        """Show a job in OpenAI's terms."""
        return fine_tunes.job_body(facts_of(record), self._clock.now())

    def events(self, job_id: str, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Return a page of a job's events, newest first, and whether there are more.

        Raises:
            JobNotFound: There is no such job.
            SettingRejected: `after` is no event of it.
        """
        self.get(job_id)
        before = history.sequence_of(after, job_id) if after is not None else None
        if after is not None and before is None:
            message = f"after={after}: that is no event of the job"
            raise SettingRejected(message, errors=[{"location": ["after"], "message": message}])
        found = self._training.ledger.newest_events(job_id, before, limit + 1, history.TOLD)
        return [history.event_body(history.JobEvent(**vars(event))) for event in found[:limit]], len(found) > limit

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Return a job's checkpoints that can be used, newest first.

        Raises:
            JobNotFound: There is no such job.
        """
        name = fine_tunes.name_of(facts_of(self.get(job_id)))
        figures = self._figures(job_id)
        found = [facts for facts in self._training.checkpoints.all(job_id, check_sums=False) if facts.problem is None]
        return [
            history.checkpoint_body(
                job_id,
                name,
                history.CheckpointFacts(facts.step, facts.created_s),
                figures.get(facts.step, history.StepFigures()),
            )
            for facts in reversed(found)
        ]

    def _figures(self, job_id: str) -> dict[int, history.StepFigures]:
        metrics, evaluations = (
            [history.JobEvent(**vars(event)) for event in self._training.ledger.events(job_id, 0, _EVERY, kind)]
            for kind in ("metrics", "evaluation")
        )
        return history.figures_by_step(metrics, evaluations)

    # Files, the results among them

    def files(self) -> list[FileRecord]:
        """Return every file, newest first, with the result files of the jobs that have succeeded."""
        results = [self._result_file(job) for job in self._training.ledger.all(frozenset({JobState.SUCCEEDED}))]
        return sorted([*self._files.all(), *results], key=lambda file: (file.created_at, file.id), reverse=True)

    def file(self, file_id: str) -> FileRecord:
        """Return one file.

        Raises:
            FileNotFound: There is none of that id.
        """
        job_id = job_of_results(file_id)
        return self._files.get(file_id) if job_id is None else self._result_file(self._succeeded(job_id, file_id))

    def result(self, file_id: str) -> bytes | None:
        """Return the content of a result file; None for any other file.

        Raises:
            FileNotFound: There is no such job, or it has not succeeded.
        """
        job_id = job_of_results(file_id)
        return history.result_csv(self._figures(self._succeeded(job_id, file_id).id)) if job_id is not None else None

    def delete_file(self, file_id: str) -> None:
        """Delete a file.

        Raises:
            FileNotFound: There is none of that id.
            FileInUse: A job that has not ended needs it.
            ResultFileKept: It is a result file.
        """
        job_id = job_of_results(file_id)
        if job_id is not None:
            self._succeeded(job_id, file_id)
            raise ResultFileKept(
                f"{file_id} is made from the metrics of its job; it goes with DELETE /api/training/jobs/{job_id}."
            )
        self._files.delete(file_id)

    def _succeeded(self, job_id: str, file_id: str) -> JobRecord:
        try:
            job = self.get(job_id)
        except JobNotFound:
            job = None
        if job is None or job.state is not JobState.SUCCEEDED:
            raise FileNotFound(f"No file has the id {file_id}.")
        return job

    def _result_file(self, job: JobRecord) -> FileRecord:
        size = self._result_bytes.get(job.id)
        if size is None:
            size = self._result_bytes[job.id] = len(history.result_csv(self._figures(job.id)))
        when = job.finished_at or job.created_at
        return FileRecord(results_of_job(job.id), _RESULT_NAME, RESULTS, size, "processed", None, when, None)

    # Steering

    def cancel(self, job_id: str) -> JobRecord:
        """End a job. The checkpoints that it has stay, as they do with OpenAI.

        Raises:
            TransitionNotPermitted: It has ended already.
        """
        self._training.cancel(job_id, "checkpoints")
        return self.get(job_id)

    def pause(self, job_id: str) -> JobRecord:
        """Stop a job so that it can go on later.

        Raises:
            TransitionNotPermitted: It is paused, or has ended.
        """
        return self._training.pause(job_id)

    def resume(self, job_id: str) -> JobRecord:
        """Let a paused job go on.

        Raises:
            TransitionNotPermitted: It is not paused.
        """
        return self._training.resume(job_id)


def _metadata(record: JobRecord) -> dict[str, str]:
    asked = record.openai_request
    return (asked.metadata or {}) if asked is not None else {}


def _digest(wish: FineTuneWish) -> str:
    return hashlib.sha256(json.dumps(asdict(wish), sort_keys=True).encode()).hexdigest()[:32]


@singleton
def get_fine_tuning_service() -> FineTuningService:
    """Return the process's fine-tuning service."""
    return FineTuningService(
        get_training_service(),
        get_file_service(),
        get_dataset_service(),
        get_peft_service(),
        get_model_registry_service(),
        get_served_model_service(),
        get_initial_adapters(),
        get_settings().model_names,
        SystemClock(),
    )
