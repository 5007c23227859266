"""The benchmarks import what there is: they run too seldom, and too long, for an old name to be noticed otherwise."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

BENCH = Path(__file__).resolve().parents[3] / "bench"
OURS = ("core", "domain", "engine", "services", "store")
ENGINE = re.compile(r"^\s*from engine\b", re.MULTILINE)


def _benchmarks() -> Iterator[ParameterSet]:
    for path in sorted(BENCH.rglob("*.py")):
        name = str(path.relative_to(BENCH))
        yield pytest.param(name, marks=[pytest.mark.engine] if ENGINE.search(path.read_text(encoding="utf-8")) else [])


@pytest.mark.parametrize("name", list(_benchmarks()))
def test_every_name_that_a_benchmark_takes_from_the_service_is_there(name: str) -> None:
    tree = ast.parse((BENCH / name).read_text(encoding="utf-8"))
    taken = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS
        for alias in node.names
    ]
    missing = []
    for module, wanted in taken:
        found = import_module(str(module))
        if not hasattr(found, wanted):
            try:
                import_module(f"{module}.{wanted}")
            except ImportError:
                missing.append(f"{module}.{wanted}")
    assert missing == []
