"""What the process has one of is built in one place: a second one would not share its pauses, locks and readings."""

import ast
from collections import Counter

import pytest

from tests.support.server import BACKEND

SOURCES = [
    ast.parse(path.read_text(encoding="utf-8"))
    for room in ("core", "domain", "store", "services", "api")
    for path in sorted((BACKEND / room).rglob("*.py"))
]
SINGLE = sorted(
    ast.unparse(node.returns)
    for tree in SOURCES
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
    and node.returns is not None
    and any(isinstance(by, ast.Name) and by.id == "singleton" for by in node.decorator_list)
)
BUILT = Counter(
    node.func.id
    for tree in SOURCES
    for node in ast.walk(tree)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
)


def test_the_getters_are_found() -> None:
    assert {"HubClient", "HubHttp", "HostProbe", "Machine", "Database"} <= set(SINGLE)


@pytest.mark.parametrize("name", SINGLE)
def test_a_singleton_is_built_in_one_place(name: str) -> None:
    assert SINGLE.count(name) == 1
    assert BUILT[name] <= 1  # none where a class builds itself, as the settings do
