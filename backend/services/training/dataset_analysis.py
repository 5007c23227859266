"""What a fine-tune would learn from a dataset. An engine that has a tokenizer and no weights computes it once."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import DatasetRejected, ModelRejected
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.jobs.states import JobState
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig, recorded
from domain.peft.objectives import usual_settings
from domain.peft.use_cases import UseCaseId
from domain.results import DatasetFigures
from services.dataset_service import DatasetService, get_dataset_service
from services.engine_service import get_engines
from services.engines.process import CommandFailed, EngineProcess
from services.engines.warm import Engines
from services.model_registry_service import get_model_files
from services.models.files import ModelFiles
from services.peft_service import PeftService, get_peft_service
from services.training.kept_analyses import KeptAnalyses
from services.training.learnable import require_learnable, some_answer_fits
from store.database import Database, get_database
from store.records import JobRecord
from store.repositories import Jobs


@dataclass(frozen=True)
class AnalysisRequest:
    """Which dataset, for which model, with which settings of a job.

    Attributes:
        example_row: The row to show rendered, counted from 0; None for the first row with something to learn.
    """

    dataset_id: str
    model_id: str
    revision: str | None
    algorithm: Algorithm
    use_case: UseCaseId | None
    overrides: dict[str, Any]
    example_row: int | None


@dataclass(frozen=True)
class Duration:
    """How long the training would take, at the speed of a job that trained the same model in the same way."""

    expected_s: float
    tokens_per_s: float
    measured_by_job_id: str


@dataclass(frozen=True)
class Analysis:
    """The engine's figures, the settings that they hold for, and how long training would take.

    Attributes:
        duration: From the newest job that trained this model by this method; None if there is none.
    """

    dataset_id: str
    model_id: str
    revision: str | None
    config: PeftConfig
    figures: DatasetFigures
    duration: Duration | None


class Running:
    """An analysis under way: its progress (0..1), and a future of its figures."""

    def __init__(self, request: AnalysisRequest, config: PeftConfig) -> None:
        self.request, self.config = request, config
        self.fraction = 0.0
        self.future: Future[DatasetFigures] = Future()


class DatasetAnalysisService:
    """Analyses datasets, one at a time, and keeps each analysis beside its dataset.

    Args:
        engines: Gives an engine for each.
        log_dir: Where engines write.
    """

    def __init__(
        self,
        database: Database,
        datasets: DatasetService,
        peft: PeftService,
        files: ModelFiles,
        engines: Engines,
        log_dir: Path,
    ) -> None:
        self._database, self._datasets, self._peft, self._files = database, datasets, peft, files
        self._engines, self._log_dir, self._kept = engines, log_dir, KeptAnalyses(datasets)
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="analysis")
        self._process: EngineProcess | None = None

    def begin(self, request: AnalysisRequest) -> Running:
        """Return a kept analysis, join one that is under way, or begin one.

        Raises:
            DatasetNotFound, ModelNotFound: There is none of that id.
            DatasetNotTrainable: A fine-tune cannot learn from such a dataset.
            SettingRejected: A setting cannot take effect.
        """
        config = self._config(request)
        self._datasets.check_trainable(request.dataset_id, config.train_on, config.objective)
        return self._begin(request, config)

    def begin_in_doubt(self, job: JobRecord) -> Running | None:
        """Begin an analysis of a job's data if it may be that nothing can be learned from it; else return None.

        Without the analysis the job would fail only after its base is downloaded and loaded.

        Raises:
            DatasetNotFound, ModelNotFound: There is none of that id.
        """
        config = recorded(job.config)
        if some_answer_fits(self._datasets.rows_path(job.dataset_id), config.train_on, config.max_seq_length):
            return None
        algorithm = Algorithm(job.algorithm)
        request = AnalysisRequest(job.dataset_id, job.model_id, job.revision, algorithm, None, {}, None)
        return self._begin(request, config)

    def _begin(self, request: AnalysisRequest, config: PeftConfig) -> Running:
        path = self._files.ensure_tokenizer(request.model_id, request.revision)
        file = self._kept.file(request.dataset_id, path, config, request.example_row)
        kept = self._kept.read(file)
        if kept is None:
            return self._start(file, request, config, path)
        done = Running(request, config)
        done.future.set_result(kept.figures)
        return done

    def finish(self, running: Running) -> Analysis:
        """Return an analysis whose future is done.

        Raises:
            ModelRejected: The model's tokenizer cannot be used.
            EngineFailed: The engine died.
        """
        figures, request = running.future.result(), running.request
        duration = self._duration(request, figures.epoch.total_tokens)
        return Analysis(request.dataset_id, request.model_id, request.revision, running.config, figures, duration)

    def check_learnable(self, dataset_id: str, model_id: str, revision: str | None, config: PeftConfig) -> None:
        """Refuse a dataset that is known to teach this model nothing.

        Raises:
            DatasetNotTrainable: An analysis with the same settings found no token to learn.
        """
        wanted = (model_id, revision, config.train_on)
        for kept in self._kept.of(dataset_id):
            about = kept.about
            # A row that has nothing to learn within a length has nothing within a shorter one.
            longer = about.max_seq_length >= config.max_seq_length
            if longer and (about.model_id, about.revision, about.train_on) == wanted:
                require_learnable(dataset_id, config.max_seq_length, kept.figures)

    def longest_row(self, dataset_id: str, model_id: str, revision: str | None) -> int | None:
        """Return the tokens of the longest row for a model's tokenizer, if an analysis has counted them."""
        for kept in self._kept.of(dataset_id):
            if (kept.about.model_id, kept.about.revision) == (model_id, revision):
                return kept.figures.tokens.maximum or None
        return None

    def _config(self, request: AnalysisRequest) -> PeftConfig:
        overrides = usual_settings(self._datasets.get(request.dataset_id).format) | request.overrides
        where = self._peft.on_device(request.model_id, request.revision)
        return self._peft.configure(request.algorithm, request.use_case, overrides, where).config

    def _start(self, file: Path, request: AnalysisRequest, config: PeftConfig, path: Path) -> Running:
        """Begin an analysis, or join the one that is under way for the same file."""
        with self._lock:
            running = self._running.get(file.name)
            if running is None:
                running = self._running[file.name] = Running(request, config)
                self._worker.submit(self._work, file, running, request, config, path)
        return running

    def _work(self, file: Path, running: Running, request: AnalysisRequest, config: PeftConfig, path: Path) -> None:
        try:
            figures = self._ask(running, request, config, path)
            self._kept.write(file, request.model_id, request.revision, config, figures)
            running.future.set_result(figures)
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            running.future.set_exception(error)
        finally:
            with self._lock:
                del self._running[file.name]

    def _ask(self, running: Running, request: AnalysisRequest, config: PeftConfig, path: Path) -> DatasetFigures:
        command = protocol.Analyze(
            model_path=str(path),
            dataset_path=str(self._datasets.rows_path(request.dataset_id)),
            rows=self._datasets.get(request.dataset_id).rows,
            config=config,
            example_row=request.example_row,
        )

        def progress(event: protocol.Progress) -> None:
            running.fraction = event.fraction or 0.0

        process = self._process = self._engines.take(self._log_dir / "engine-analysis.log")
        try:
            return process.request(command, progress).result()
        except CommandFailed as error:
            kinds = {"bad_model": ModelRejected, "bad_data": DatasetRejected}
            kind = kinds.get(error.extras["error_class"])
            if kind is None:
                raise
            raise kind(f"{request.model_id}: {error.detail}.") from error
        finally:
            self._process = None
            process.close()

    def _duration(self, request: AnalysisRequest, total_tokens: int) -> Duration | None:
        with self._database.begin() as connection:
            jobs = Jobs(connection).all(frozenset({JobState.SUCCEEDED}))
        for job in jobs:
            speed = job.progress.tokens_per_s
            if (job.model_id, job.algorithm) == (request.model_id, request.algorithm.value) and speed:
                return Duration(total_tokens / speed, speed, job.id)
        return None

    def close(self) -> None:
        """End the analysis that is under way."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        process = self._process
        if process is not None:
            process.kill()


@singleton
def get_dataset_analysis_service() -> DatasetAnalysisService:
    """Return the process's analysis service."""
    return DatasetAnalysisService(
        get_database(),
        get_dataset_service(),
        get_peft_service(),
        get_model_files(),
        get_engines(),
        get_settings().home / "logs",
    )
