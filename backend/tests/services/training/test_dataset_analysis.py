"""When a job's data is looked at before its base is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from services.training.dataset_analysis import DatasetAnalysisService, some_answer_fits


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
