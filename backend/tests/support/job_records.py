"""A queued job and its dataset, as a record."""

from typing import Any

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from store.records import DatasetRecord, JobRecord

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
CONFIG = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU).config
MOMENT = "2026-01-01T00:00:00.000000Z"
DATASET = DatasetRecord("ds", "n", "messages", 1, 0, 1, "0" * 64, [], [], MOMENT)


def job_record(number: int, **changes: Any) -> JobRecord:
    """Return a job of DATASET, queued at its number, with what a test changes."""
    fields: dict[str, Any] = {
        "id": f"job_{number}", "sequence": number, "name": "n", "priority": 0, "idempotency_key": None,
        "request_sha256": "", "model_id": "m", "revision": None, "loaded_model_id": None, "load_options": None,
        "algorithm": "lora", "config": CONFIG.model_dump(mode="json"), "dataset_id": DATASET.id,
        "validation_dataset_id": None, "validation_fraction": 0.0, "created_at": MOMENT,
    }  # fmt: skip
    return JobRecord(**fields | changes)
