"""Files: their ids, their purposes, and their pages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
FINE_TUNE, RESULTS = "fine-tune", "fine-tune-results"
Purpose = Literal["fine-tune", "user_data"]
# Why the other purposes of OpenAI's API are refused.
NOT_HERE = {
    "assistants": "there are no assistants here",
    "batch": "there are no batches here",
    "vision": "nothing here reads pictures",
    "evals": "there are no evals here; a validation_file is evaluated while a job trains",
}
_FILE, _DATASET, _JOB, _RESULT = "file-", "ds_", "job_", "file-results-"


def file_of_dataset(dataset_id: str) -> str:
    """Return the id under which a dataset is a file: every dataset is one."""
    return _FILE + dataset_id.removeprefix(_DATASET)


def dataset_of_file(file_id: str) -> str:
    """Return the id of the dataset that a file's rows become."""
    return _DATASET + file_id.removeprefix(_FILE)


def results_of_job(job_id: str) -> str:
    """Return the id of a job's result file."""
    return _RESULT + job_id.removeprefix(_JOB)


def job_of_results(file_id: str) -> str | None:
    """Return the job whose result file it is; None for any other file."""
    return _JOB + file_id.removeprefix(_RESULT) if file_id.startswith(_RESULT) else None


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list."""

    data: list[T]
    has_more: bool


class NoSuchPlace(ValueError):
    """The list has no item of the id after which a page is to begin."""


def page(items: Sequence[T], id_of: Callable[[T], str], after: str | None, limit: int) -> Page[T]:
    """Return a page of a list.

    Args:
        items: The whole list, in order.
        id_of: Names an item.
        after: The item before the first one; None to begin with the list.
        limit: The most items.

    Raises:
        NoSuchPlace: There is no item `after`.
    """
    start = 0
    if after is not None:
        start = next((at + 1 for at, item in enumerate(items) if id_of(item) == after), -1)
        if start < 0:
            raise NoSuchPlace(f"after={after}: there is no such item in the list.")
    return Page(list(items[start : start + limit]), len(items) > start + limit)
