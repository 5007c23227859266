"""When a job's data is looked at before its base is loaded."""

import json
from pathlib import Path
from typing import Any

from services.dataset_service import DatasetService
from services.training.dataset_analysis import DatasetAnalysisService, some_answer_fits
from tests.support.job_records import CONFIG, job_record


class OneDataset(DatasetService):
    """Has the rows of one file."""

    def __init__(self, rows: Path) -> None:
        self._rows = rows

    def rows_path(self, dataset_id: str) -> Path:
        return self._rows


def test_a_job_queued_before_some_settings_existed_is_looked_at(tmp_path: Path) -> None:
    config = CONFIG.model_dump(mode="json")
    for name in ("adam_beta1", "neftune_noise_alpha", "lora_plus_ratio"):
        del config[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "Once."}) + "\n")
    nothing: Any = None
    service = DatasetAnalysisService(nothing, OneDataset(tmp_path / "rows.jsonl"), nothing, nothing, tmp_path)
    assert service.begin_in_doubt(job_record(1, config=config)) is None
    service.close()


def test_the_calls_of_earlier_turns_count_too(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x" * 200}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Nothing."},
        {"role": "assistant", "content": "There is nothing."},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    assert some_answer_fits(rows, "assistant", 64)
    assert not some_answer_fits(rows, "last_assistant", 64)
    assert some_answer_fits(rows, "last_assistant", 512)
