"""Why a job failed, as responses show it: a training job or an export."""

from pydantic import Field

from api.peft_schemas import Response
from domain.jobs.failures import Failure


class JobError(Response):
    error_class: str = Field(serialization_alias="class", validation_alias="class")
    message: str
    exit_code: int | None
    signal: int | None
    log_tail: list[str]
    suggestions: list[str]


def error_view(failure: Failure | None) -> JobError | None:
    """Show why it failed, if it did."""
    return JobError.model_validate(failure.model_dump(by_alias=True)) if failure is not None else None
