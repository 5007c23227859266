"""Ids, names and pages are translated there and back."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.openai.errors import openai_error
from domain.openai.files import NoSuchPlace, dataset_of_file, file_of_dataset, job_of_results, page, results_of_job
from domain.openai.fine_tunes import auto_epochs, ftjob, job_of
from domain.openai.history import StepFigures, event_id, result_csv, sequence_of
from domain.openai.names import FineTunedName, read_fine_tuned, stands_for, suffix_in_name

HEX = st.text("0123456789abcdef", min_size=12, max_size=12)
BASES = st.text(string.ascii_letters + string.digits + "-_./", min_size=1, max_size=60)


@given(BASES, st.text(max_size=64), HEX, st.none() | st.integers(0, 10**8))
def test_a_name_is_read_as_it_was_written(base: str, suffix: str, own_id: str, step: int | None) -> None:
    name = FineTunedName(base, suffix_in_name(suffix), own_id, step)
    assert read_fine_tuned(str(name)) == name
    assert read_fine_tuned(str(name.at(None)) + ":ckpt-step-x") is None


@given(HEX)
def test_ids_lead_back(own_id: str) -> None:
    assert dataset_of_file(file_of_dataset(f"ds_{own_id}")) == f"ds_{own_id}"
    assert job_of_results(results_of_job(f"job_{own_id}")) == f"job_{own_id}"
    assert job_of_results(file_of_dataset(f"ds_{own_id}")) is None
    assert job_of(ftjob(f"job_{own_id}")) == f"job_{own_id}"


@given(HEX, HEX, st.integers(1, 10**9))
def test_an_event_is_only_of_its_job(job: str, other: str, sequence: int) -> None:
    event = event_id(f"job_{job}", sequence)
    assert sequence_of(event, f"job_{job}") == sequence
    assert (sequence_of(event, f"job_{other}") is None) == (job != other)


@given(st.lists(st.integers(), unique=True), st.integers(1, 5))
def test_pages_put_together_are_the_list(items: list[int], limit: int) -> None:
    found: list[int] = []
    while True:
        part = page(items, str, str(found[-1]) if found else None, limit)
        found += part.data
        assert len(part.data) <= limit
        if not part.has_more:
            break
        assert part.data
    assert found == items


def test_a_page_after_nothing_is_refused() -> None:
    with pytest.raises(NoSuchPlace):
        page([1], str, "2", 1)


@given(st.integers(1, 10**6))
def test_auto_passes_are_those_of_the_cookbook(rows: int) -> None:
    epochs = auto_epochs(rows)
    assert 1 <= epochs <= 25
    assert rows * epochs <= 25_000 or epochs == 1
    assert rows * epochs > 75 or epochs == 25


def test_the_first_name_that_fits_counts() -> None:
    names = (("gpt-4o-mini-2024*", "a/one"), ("gpt-*", "a/two"))
    assert stands_for("gpt-4o-mini-2024-07-18", names) == "a/one"
    assert stands_for("gpt-3.5-turbo", names) == "a/two"
    assert stands_for("davinci-002", names) is None


def test_a_result_file_has_empty_cells_for_what_was_not_measured() -> None:
    figures = {2: StepFigures(0.5, None, 0.25, None), 1: StepFigures(1.0)}
    assert result_csv(figures).decode().splitlines()[1:] == ["1,1.0,,,", "2,0.5,,0.25,"]


@pytest.mark.parametrize(
    ("path", "slug", "status", "seen", "headers"),
    [
        ("/v1/chat/completions", "does-not-fit", 409, 503, {"Retry-After": "10"}),
        ("/v1/chat/completions", "model-busy", 409, 503, {"Retry-After": "10"}),
        ("/v1/fine_tuning/jobs", "does-not-fit", 409, 400, {"x-should-retry": "false"}),
        ("/v1/fine_tuning/jobs", "invalid-request", 422, 400, {"x-should-retry": "false"}),
        ("/v1/files", "hub-unavailable", 503, 503, {}),
        ("/v1/files", "storage-full", 507, 507, {"x-should-retry": "false"}),
    ],
)
def test_what_would_fail_again_is_not_tried_again(
    path: str, slug: str, status: int, seen: int, headers: dict[str, str]
) -> None:
    said = openai_error(path, slug, status, "why", {"errors": [{"location": ["body", "method", "literal['a']"]}]})
    assert (said.status, said.headers) == (seen, headers)
    assert said.body["error"]["param"] == "method" and said.body["error"]["message"] == "why"
