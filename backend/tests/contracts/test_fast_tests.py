"""`make test-fast` starts no engine and imports no torch: a test that does fails there, whoever handles the refusal."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.server import BACKEND

TESTS = """
import subprocess, sys
from contextlib import suppress
from services.engines.process import EngineProcess

def test_of_an_engine(tmp_path):
    with suppress(Exception):
        EngineProcess(tmp_path / "engine.log").kill()

def test_of_an_engine_that_a_child_starts():
    subprocess.run([sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-m', 'engine'])"])

def test_of_torch():
    with suppress(Exception):
        import torch

def test_of_arithmetic():
    assert 1 + 1 == 2
"""


def test_a_fast_test_that_starts_an_engine_or_imports_torch_fails(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    options = ["-p", "tests.support.no_engine", "-p", "no:cacheprovider", "-rA", f"--rootdir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(BACKEND)}
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    run = subprocess.run(command, cwd=BACKEND, env=environment, capture_output=True, text=True, check=False)
    failed = {line.split("::")[1].split(" ")[0] for line in run.stdout.splitlines() if line.startswith("ERROR ")}
    assert failed == {"test_of_an_engine", "test_of_an_engine_that_a_child_starts", "test_of_torch"}, run.stdout
    assert "4 passed, 3 errors" in run.stdout


def test_make_test_fast_runs_with_what_refuses_them() -> None:
    [command] = [line for line in (BACKEND.parent / "Makefile").read_text().splitlines() if "not engine" in line]
    assert "-p tests.support.no_engine" in command
