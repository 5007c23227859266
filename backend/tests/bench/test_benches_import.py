"""The benchmarks import what there is: they run too seldom, and too long, for an old name to be noticed otherwise."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[3] / "bench"
OURS = ("core", "domain", "engine", "services", "store")


@pytest.mark.parametrize("name", sorted(str(path.relative_to(BENCH)) for path in BENCH.rglob("*.py")))
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
