"""When a job's data is looked at before its base is loaded."""

import json
from pathlib import Path
from typing import Any

from services.dataset_service import DatasetService
from services.training.dataset_analysis import DatasetAnalysisService
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
    service = DatasetAnalysisService(nothing, OneDataset(tmp_path / "rows.jsonl"), nothing, nothing, nothing, tmp_path)
    assert service.begin_in_doubt(job_record(1, config=config)) is None
    service.close()
