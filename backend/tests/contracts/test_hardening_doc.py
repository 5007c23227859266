"""docs/hardening.md and SECURITY.md name tests that there are, and all forty attacks."""

import re

from tests.support.server import BACKEND

TABLE, PAGE = BACKEND.parent / "docs" / "hardening.md", BACKEND.parent / "SECURITY.md"
_FILE = re.compile(r"\b((?:\w+/)+test_\w+\.py)(?:::(test_\w+))?")
_ALONE = re.compile(r"`(test_\w+)`")


def test_forty_attacks_have_a_test_each() -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert rows == list(range(1, 41))


def test_every_test_that_is_named_is_there() -> None:
    known = {path: path.read_text(encoding="utf-8") for path in (BACKEND / "tests").rglob("test_*.py")}
    everything = "\n".join(known.values())
    for page in (TABLE, PAGE):
        text = page.read_text(encoding="utf-8")
        named = _FILE.findall(text)
        assert len(named) > 15
        for file, function in named:
            path = BACKEND / "tests" / file
            assert path in known, file
            assert not function or f"def {function}(" in known[path], function
        for function in _ALONE.findall(text):
            assert f"def {function}(" in everything, function
