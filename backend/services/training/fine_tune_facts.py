"""What OpenAI's API shows of a job, read from its record."""

from domain.jobs.states import FINAL_STATES
from domain.openai.fine_tunes import JobFacts, training_file_of
from domain.openai.names import read_fine_tuned
from domain.peft.config import recorded
from store.records import JobRecord


def facts_of(record: JobRecord) -> JobFacts:
    """Read what OpenAI's API shows of a job from its record, whichever way it came."""
    asked, validation = record.openai_request, record.validation_dataset_id
    asked_model = asked.model if asked is not None else record.model_id
    continued = read_fine_tuned(asked_model)
    return JobFacts(
        id=record.id,
        state=record.state,
        asked_model=asked_model,
        base_name=continued.base if continued is not None else asked_model,
        suffix=asked.suffix if asked is not None else None,
        learning_rate_multiplier=asked.learning_rate_multiplier if asked is not None else None,
        metadata=asked.metadata if asked is not None else None,
        config=recorded(record.config),
        training_file=training_file_of(record.dataset_id),
        validation_file=training_file_of(validation) if validation is not None else None,
        created_at=record.created_at,
        finished_at=record.finished_at if record.state in FINAL_STATES else None,
        eta_s=record.progress.eta_s,
        tokens=record.result.tokens if record.result is not None else None,
        error=(record.error.error_class, record.error.message) if record.error is not None else None,
        has_model=record.adapter_id is not None,
    )
