"""Analyses that were made before, kept beside their datasets."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.files import write_atomic
from core.logging import get_logger
from domain.jobs.stored import Stored
from domain.peft.config import PeftConfig
from domain.results import DatasetFigures
from services.dataset_service import DatasetService

_VERSION = 3  # of the computation; an analysis of another version is not used
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*"),
    *("chat_template*", "additional_chat_templates/*"),
)
# The settings that change the figures.
_SETTINGS = (
    *("objective", "train_on", "max_seq_length", "packing", "batch_size", "gradient_accumulation"),
    *("epochs", "max_steps"),
)
_log = get_logger(__name__)


class AnalysisSubject(Stored):
    """What an analysis is of: the model, and the settings that change the figures."""

    model_id: str
    revision: str | None
    objective: str = "sft"  # earlier versions knew no other
    train_on: str
    max_seq_length: int
    packing: bool
    batch_size: int
    gradient_accumulation: int
    epochs: float
    max_steps: int | None


class KeptAnalysis(Stored):
    """An analysis as its file keeps it."""

    about: AnalysisSubject
    figures: DatasetFigures


class KeptAnalyses:
    """Reads and writes the files of analyses.

    Args:
        datasets: Where the folders are.
    """

    def __init__(self, datasets: DatasetService) -> None:
        self._datasets = datasets

    def file(self, dataset_id: str, tokenizer: Path, config: PeftConfig, example_row: int | None) -> Path:
        """Return the file of an analysis. Its name is a digest of everything that the analysis depends on.

        Args:
            dataset_id: The dataset.
            tokenizer: The folder that has the model's tokenizer.
            config: The settings.
            example_row: The row that is shown rendered.
        """
        about = [
            _VERSION,
            self._datasets.manifest(dataset_id).rows_sha256,
            _fingerprint(tokenizer),
            _settings(config),
            example_row,
        ]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return self._datasets.folder(dataset_id) / f"analysis-{key}.json"

    def read(self, file: Path) -> KeptAnalysis | None:
        """Return what a file keeps; None if it is not there or cannot be read."""
        try:
            return KeptAnalysis.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            _log.warning("analysis.not_read", path=str(file))
            return None

    def of(self, dataset_id: str) -> Iterator[KeptAnalysis]:
        """Yield every analysis of a dataset that can be read."""
        for file in self._datasets.folder(dataset_id).glob("analysis-*.json"):
            kept = self.read(file)
            if kept is not None:
                yield kept

    def write(
        self, file: Path, model_id: str, revision: str | None, config: PeftConfig, figures: DatasetFigures
    ) -> None:
        """Keep an analysis, unless its dataset was deleted meanwhile."""
        if file.parent.is_dir():
            about = AnalysisSubject(model_id=model_id, revision=revision, **_settings(config))
            write_atomic(file, KeptAnalysis(about=about, figures=figures).model_dump_json().encode())


def _settings(config: PeftConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SETTINGS}


def _fingerprint(path: Path) -> str:
    """Return a digest of the files that make a tokenizer."""
    digest = hashlib.sha256()
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})
    for file in files:
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
