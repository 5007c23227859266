"""What a fine-tune would learn from a dataset: worked out once by an engine that has a tokenizer and no weights."""

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.errors import DatasetNotTrainable, DatasetRejected, ModelRejected
from core.files import write_atomic
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.jobs.states import JobState
from domain.jobs.stored import Stored
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig, recorded
from domain.peft.use_cases import UseCaseId
from domain.results import DatasetFigures
from services.dataset_service import DatasetService, get_dataset_service
from services.engines.process import CommandFailed, EngineProcess
from services.model_registry_service import get_model_files
from services.models.files import ModelFiles
from services.peft_service import PeftService, get_peft_service
from store.database import Database, get_database
from store.records import JobRecord
from store.repositories import Jobs

_VERSION = 1  # of what is computed; a kept analysis of another one is not used
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*"),
    *("chat_template*", "additional_chat_templates/*"),
)
# What changes the figures; the rest of a configuration does not.
_SETTINGS = (
    *("train_on", "max_seq_length", "packing", "batch_size", "gradient_accumulation"),
    *("epochs", "max_steps"),
)
# Findings that leave a row with nothing to learn.
_WHY_NOTHING = {
    "answer_lost": "the answer begins beyond it",
    "nothing_to_learn": "no token is learned",
    "refused": "the model's chat template refuses the conversation",
}
_LOOKED_AT = 1000  # rows; one that fits is enough, and mostly it is the first
_TEMPLATE_TOKENS = 8  # of a turn: its marks and its role
_log = get_logger(__name__)


@dataclass(frozen=True)
class AnalysisRequest:
    """Which dataset, for which model, with which settings of a job.

    Attributes:
        example_row: The row to show rendered, from 0, or None for the first with something to learn.
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
    """The figures of the engine, what they were made with, and how long training would take.

    Attributes:
        duration: From the newest job that trained this model in this way, or None if there is none.
    """

    dataset_id: str
    model_id: str
    revision: str | None
    config: PeftConfig
    figures: DatasetFigures
    duration: Duration | None


class _About(Stored):
    """What an analysis is of, as its file keeps it."""

    model_id: str
    revision: str | None
    train_on: str
    max_seq_length: int
    packing: bool
    batch_size: int
    gradient_accumulation: int
    epochs: float
    max_steps: int | None


class _Kept(Stored):
    """An analysis as its file keeps it."""

    about: _About
    figures: DatasetFigures


class Running:
    """An analysis under way: how far it is (0..1), and a future of its figures."""

    def __init__(self, request: AnalysisRequest, config: PeftConfig) -> None:
        self.request, self.config = request, config
        self.fraction = 0.0
        self.future: Future[DatasetFigures] = Future()


class DatasetAnalysisService:
    """Analyses datasets, one at a time, and keeps what came out beside the dataset.

    Args:
        log_dir: Where engines write.
    """

    def __init__(
        self, database: Database, datasets: DatasetService, peft: PeftService, files: ModelFiles, log_dir: Path
    ) -> None:
        self._database, self._datasets, self._peft, self._files = database, datasets, peft, files
        self._log_dir = log_dir
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="analysis")
        self._process: EngineProcess | None = None

    def begin(self, request: AnalysisRequest) -> Running:
        """Begin an analysis, or join the one that is under way, or find the one that is kept.

        Raises:
            DatasetNotFound, ModelNotFound: There is none of that id.
            DatasetNotTrainable: A fine-tune cannot learn from such a dataset.
            SettingRejected: A setting cannot take effect.
        """
        config = self._config(request)
        self._datasets.check_trainable(request.dataset_id, config.train_on)
        return self._begin(request, config)

    def begin_in_doubt(self, job: JobRecord) -> Running | None:
        """Begin an analysis of a job's data where it is in doubt that anything can be learned; None where it is not.

        Without one, that would come out once the base is downloaded and loaded.

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
        kept = self._place(request, config, path)
        done = self._read(kept)
        if done is None:
            return self._start(kept, request, config, path)
        found = Running(request, config)
        found.future.set_result(done.figures)
        return found

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
        for kept in self._kept(dataset_id):
            about = kept.about
            # What is beyond the end of a row is beyond that of a shorter one.
            longer = about.max_seq_length >= config.max_seq_length
            if longer and (about.model_id, about.revision, about.train_on) == wanted:
                require_learnable(dataset_id, config.max_seq_length, kept.figures)

    def longest_row(self, dataset_id: str, model_id: str, revision: str | None) -> int | None:
        """Return the tokens of the longest row for a model's tokenizer, if an analysis has counted them."""
        for kept in self._kept(dataset_id):
            if (kept.about.model_id, kept.about.revision) == (model_id, revision):
                return kept.figures.tokens.maximum or None
        return None

    def _config(self, request: AnalysisRequest) -> PeftConfig:
        overrides = dict(request.overrides)
        if "train_on" not in overrides and self._datasets.get(request.dataset_id).format == "text":
            overrides["train_on"] = "all"
        where = self._peft.on_device(request.model_id, request.revision)
        return self._peft.configure(request.algorithm, request.use_case, overrides, where).config

    def _place(self, request: AnalysisRequest, config: PeftConfig, path: Path) -> Path:
        """Return the file in which an analysis is kept: named for all that it depends on."""
        about = [
            _VERSION,
            self._datasets.manifest(request.dataset_id).rows_sha256,
            _fingerprint(path),
            _read_settings(config, _SETTINGS),
            request.example_row,
        ]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return self._datasets.folder(request.dataset_id) / f"analysis-{key}.json"

    def _read(self, file: Path) -> _Kept | None:
        try:
            return _Kept.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            _log.warning("analysis.not_read", path=str(file))
            return None

    def _kept(self, dataset_id: str) -> Iterator[_Kept]:
        for file in self._datasets.folder(dataset_id).glob("analysis-*.json"):
            kept = self._read(file)
            if kept is not None:
                yield kept

    def _start(self, kept: Path, request: AnalysisRequest, config: PeftConfig, path: Path) -> Running:
        """Begin, or join what is under way for the same."""
        with self._lock:
            running = self._running.get(kept.name)
            if running is None:
                running = self._running[kept.name] = Running(request, config)
                self._worker.submit(self._work, kept, running, request, config, path)
        return running

    def _work(self, kept: Path, running: Running, request: AnalysisRequest, config: PeftConfig, path: Path) -> None:
        try:
            figures = self._ask(running, request, config, path)
            settings = _read_settings(config, _SETTINGS)
            about = _About(model_id=request.model_id, revision=request.revision, **settings)
            if kept.parent.is_dir():  # the dataset may have been deleted meanwhile
                write_atomic(kept, _Kept(about=about, figures=figures).model_dump_json().encode())
            running.future.set_result(figures)
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            running.future.set_exception(error)
        finally:
            with self._lock:
                del self._running[kept.name]

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

        process = self._process = EngineProcess(self._log_dir / "engine-analysis.log")
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
        """End what is under way."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        process = self._process
        if process is not None:
            process.kill()


def require_learnable(dataset_id: str, max_seq_length: int, figures: DatasetFigures) -> None:
    """Refuse a dataset whose analysis found nothing to learn.

    Raises:
        DatasetNotTrainable: With the rows of each finding that says why.
    """
    if figures.epoch.rows:
        return
    reasons = [
        f"{_WHY_NOTHING[name]} (rows {', '.join(str(number + 1) for number in finding.examples)}"
        f"{', …' if finding.rows > len(finding.examples) else ''})"
        for name, finding in figures.findings
        if name in _WHY_NOTHING and finding.rows
    ]
    raise DatasetNotTrainable(
        f"Nothing would be learned from {dataset_id} with max_seq_length={max_seq_length}: {'; '.join(reasons)}. "
        f"POST /api/datasets/{dataset_id}/analyze says more.",
    )


def some_answer_fits(rows: Path, train_on: str, max_seq_length: int) -> bool:
    """Tell whether one of the first rows surely has an answer that begins within a number of tokens.

    A token is a byte at least, and a turn has some of the template's own: what is long by this count may still fit.
    """
    with rows.open("rb") as file:
        for line in islice(file, _LOOKED_AT):
            row = json.loads(line)
            if "text" in row or train_on == "all":
                return True
            turns = row["messages"]
            answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
            wanted = answers[-1:] if train_on == "last_assistant" else answers
            learned = next((at for at in wanted if turns[at].get("weight", 1) != 0), None)
            if learned is None:
                continue
            before = sum(map(_most_tokens, turns[:learned])) + _TEMPLATE_TOKENS
            before += len(json.dumps(row["tools"])) if row.get("tools") else 0
            if before < max_seq_length:
                return True
    return False


def _most_tokens(turn: dict[str, Any]) -> int:
    """Return what a turn may take: its text, its reasoning and the calls it makes."""
    said = [value for name, value in turn.items() if name not in ("role", "weight")]
    return sum(len(part.encode() if isinstance(part, str) else json.dumps(part)) for part in said) + _TEMPLATE_TOKENS


def _read_settings(config: PeftConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _fingerprint(path: Path) -> str:
    """Return a sum over the files that make a tokenizer."""
    digest = hashlib.sha256()
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})
    for file in files:
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


@singleton
def get_dataset_analysis_service() -> DatasetAnalysisService:
    """Return the process's analysis service."""
    return DatasetAnalysisService(
        get_database(), get_dataset_service(), get_peft_service(), get_model_files(), get_settings().home / "logs"
    )
