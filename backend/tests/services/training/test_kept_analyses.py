"""Analyses that an earlier version kept."""

import json
from pathlib import Path

from services.dataset_service import DatasetService
from services.training.kept_analyses import KeptAnalyses
from tests.support.job_records import CONFIG


class OneFolder(DatasetService):
    """Has one dataset's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self, dataset_id: str) -> Path:
        return self._folder


def _earlier() -> dict[str, object]:
    names = ("truncated", "answer_cut", "answer_lost", "split", "nothing_to_learn", "without_end_mark", "refused")
    tokens = dict.fromkeys(("total", "minimum", "mean", "maximum", "p50", "p90", "p95", "p99"), 7)
    epoch = dict.fromkeys(
        ("rows", "sequences", "batches", "tokens", "trained_tokens", "steps", "total_steps", "total_tokens"), 1
    )
    return {
        **{"rows": 1, "findings": {name: {"rows": 0, "examples": []} for name in names}, "refusals": []},
        **{"left_out": [], "looked_at_rows": 1, "tokens": tokens, "trained_tokens": tokens, "histogram": []},
        **{"epoch": epoch, "template": "model", "example": None},
    }


def test_an_analysis_of_an_earlier_version_still_tells_what_can_be_learned(tmp_path: Path) -> None:
    settings = ("train_on", "max_seq_length", "packing", "batch_size", "gradient_accumulation", "epochs", "max_steps")
    config = CONFIG.model_dump(mode="json")
    about = {"model_id": "a/b", "revision": None} | {name: config[name] for name in settings}
    (tmp_path / "analysis-0.json").write_text(json.dumps({"about": about, "figures": _earlier()}))
    (kept,) = KeptAnalyses(OneFolder(tmp_path)).of("d")
    assert kept.figures.tokens.maximum == 7
    assert kept.figures.findings.earlier_thinking_left_out.rows == 0
