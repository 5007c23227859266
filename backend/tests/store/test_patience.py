"""What must be recorded is tried again until the database answers, or the server ends."""

import threading

import pytest

from core.errors import DatabaseUnavailable, StorageFull, StudioError
from store.patience import ServerEnds, patiently


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.patience._TRY_AGAIN_S", 0.0)


def test_a_database_that_comes_back_has_the_answer() -> None:
    errors: list[StudioError] = [StorageFull("full"), DatabaseUnavailable("away"), DatabaseUnavailable("away")]

    def use() -> str:
        if errors:
            raise errors.pop()
        return "there"

    assert patiently(use, threading.Event()) == "there" and not errors


def test_once_the_server_ends_it_is_tried_once_more_and_no_longer() -> None:
    closing, tries = threading.Event(), list[int]()
    closing.set()

    def use() -> None:
        tries.append(1)
        raise DatabaseUnavailable("away")

    with pytest.raises(ServerEnds):
        patiently(use, closing)
    assert len(tries) == 1
    assert patiently(lambda: 1, closing) == 1


def test_another_error_is_not_waited_out() -> None:
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0, threading.Event())
