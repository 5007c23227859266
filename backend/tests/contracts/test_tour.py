"""The tour leads to code that is there: every link to a file, every name that a link shows."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.server import BACKEND

TOUR = BACKEND.parent / "docs" / "tour.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def defined(path: Path) -> set[str]:
    """Return the names of a module and, after a dot, of its classes."""
    found: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    add(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize(("words", "target"), sorted(set(LINK.findall(TOUR.read_text(encoding="utf-8")))))
def test_every_link_of_the_tour_leads_to_what_it_names(words: str, target: str) -> None:
    path = (TOUR.parent / target).resolve()
    assert path.is_file(), target
    if words.startswith("`"):
        assert words.strip("`") in defined(path)
    elif path.suffix == ".py":
        assert words == path.name


def test_names_of_a_module_and_its_classes_are_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("A = 1\nB: int = 2\nclass C:\n    d: int\n    async def e(self): ...\ndef f():\n    g = 3\n")
    assert defined(module) == {"A", "B", "C", "C.d", "C.e", "f"}
