"""When a job's data is looked at before its base is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from domain.algorithms import Algorithm
from domain.configure import MachineFacts, configure
from services.dataset_analysis import DatasetAnalysisService


def test_a_job_queued_before_some_settings_existed_is_looked_at(tmp_path: Path) -> None:
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    config = configure(Algorithm.LORA, use_case=None, overrides={}, machine=machine).config.model_dump(mode="json")
    for name in ("adam_beta1", "neftune_noise_alpha", "lora_plus_ratio"):
        del config[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "Once."}) + "\n")
    nothing: Any = None
    datasets: Any = SimpleNamespace(rows_path=lambda _: tmp_path / "rows.jsonl")
    service = DatasetAnalysisService(nothing, datasets, nothing, nothing, tmp_path)
    job: Any = SimpleNamespace(config=config, dataset_id="ds")
    assert service.begin_in_doubt(job) is None
    service.close()
