"""Why a job or an export failed, as its record keeps it."""

from typing import Any

from pydantic import Field

from core.errors import StudioError
from domain.jobs.stored import Stored

_SUGGESTIONS = {
    "out_of_host_memory": [
        "halve batch_size and double gradient_accumulation: the effective batch stays",
        "halve max_seq_length",
        "algorithm qlora: a 4-bit base",
        "unload other models",
    ],
    "disk_full": ["free space, then POST …/resume"],
}


class Failure(Stored):
    """Why a job or an export failed.

    Attributes:
        error_class: What kind of failure it is; `class` where it is stored.
        exit_code: Of an engine that ended.
        signal: The one that ended it.
        log_tail: The last lines that it wrote.
        suggestions: What to change, best first.
    """

    error_class: str = Field(alias="class")
    message: str
    exit_code: int | None = None
    signal: int | None = None
    log_tail: list[str] = Field(default_factory=list)
    suggestions: list[str] = Field(default_factory=list)


def failure(error_class: str, error: StudioError) -> Failure:
    """Write an error as the record of a job or an export keeps it.

    Args:
        error_class: What kind of failure it is.
        error: Its message; its extras may hold `exit_code`, `signal`, `log_tail` and `suggestions`.
    """
    extras = error.extras
    return Failure(
        error_class=error_class,
        message=error.detail,
        exit_code=extras.get("exit_code"),
        signal=extras.get("signal"),
        log_tail=extras.get("log_tail", []),
        suggestions=_in_words(extras.get("suggestions", [])) or _SUGGESTIONS.get(error_class, []),
    )


def _in_words(suggestions: list[Any]) -> list[str]:
    """Return suggestions as sentences; those of an estimate carry figures as well."""
    return [item["change"] if isinstance(item, dict) else item for item in suggestions]
