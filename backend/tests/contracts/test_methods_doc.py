"""The table of methods in the documentation is of the methods that there are, and names tests that there are."""

import re

from domain.peft.algorithms import NOT_OFFERED, SPECS, Algorithm
from tests.support.server import BACKEND

ROOT = BACKEND.parent
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([a-z-]+)`( \(extra\))? \|(.+)\|$", re.MULTILINE)


def test_the_rows_are_all_the_algorithms_with_the_extras_marked() -> None:
    rows = ROW.findall(TEXT)
    assert [name for name, *_ in rows] == [algorithm.value for algorithm in Algorithm]
    assert {name: bool(extra) for name, extra, _ in rows} == {name.value: SPECS[name].extra for name in Algorithm}
    for name, _, cells in rows:
        assert len(cells.split("|")) == 6 and all(cell.strip() for cell in cells.split("|")), name


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(backend/tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) >= 8
    for file, function in named:
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), (file, function)
    for function in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {function}(" in (BACKEND / "tests" / "engine" / "test_parity.py").read_text(encoding="utf-8")


def test_methods_that_are_not_offered_are_named() -> None:
    assert {name for name in NOT_OFFERED if name in TEXT.lower()} == set(NOT_OFFERED)
