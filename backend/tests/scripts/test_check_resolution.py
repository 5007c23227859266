"""The check of the requirements, with uv as it is; nothing here asks an index."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import check_resolution
import pytest
from check_resolution import disagreements, pythons
from lock_requirements import ROOT

SCRIPT = ROOT / "scripts/check_resolution.py"


def _project(folder: Path, bound: str = "", constraint: str = "") -> Path:
    """Copy what the check reads into a folder, with one thing changed."""
    for name in ("pyproject.toml", "requirements.txt", "backend/requirements.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((ROOT / name).read_text())
    (folder / "requirements").mkdir()
    for file in (ROOT / "requirements").iterdir():
        (folder / "requirements" / file.name).write_text(file.read_text())
    if bound:
        document = folder / "pyproject.toml"
        document.write_text(document.read_text().replace('"psutil"', f'"{bound}"'))
    if constraint:
        with (folder / "requirements/cuda-constraints.txt").open("a") as constraints:
            constraints.write(f"{constraint}\n")
    return folder


def _there(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(check_resolution, "ROOT", folder)
    monkeypatch.setattr(check_resolution, "TESTED_SET", folder / "requirements/tested-set.txt")


def test_the_files_agree_with_one_another() -> None:
    assert disagreements() == []


def test_a_bound_that_the_tested_set_does_not_satisfy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _there(monkeypatch, _project(tmp_path, bound="psutil>=999"))
    [wrong] = disagreements()
    assert wrong.startswith("pyproject.toml asks for psutil>=999, the tested set has [")


def test_a_package_that_nobody_compiled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _there(monkeypatch, _project(tmp_path, bound="no-such-package"))
    assert disagreements() == ["pyproject.toml asks for no-such-package, the tested set has none; run `make lock`."]


def test_a_pin_written_by_hand_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin that broke every machine but one: triton in another version than torch requires."""
    _there(monkeypatch, _project(tmp_path, constraint="triton==3.9.0"))
    assert disagreements() == [
        "requirements/cuda-constraints.txt is not what requirements/tested-set.txt gives; run `make lock`."
    ]


def test_the_readme_names_the_pythons_that_are_checked() -> None:
    named = re.search(r"Python (3\.\d+) to (3\.\d+)", (ROOT / "README.md").read_text())
    assert named is not None
    assert (named[1], named[2]) == (pythons()[0], pythons()[-1])


def test_an_index_that_cannot_be_reached_is_said_and_fails_nothing(tmp_path: Path) -> None:
    unreachable = {"HTTPS_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9", "UV_HTTP_RETRIES": "0"}
    environment = os.environ | unreachable | {"UV_CACHE_DIR": str(tmp_path), "NO_PROXY": "", "no_proxy": ""}
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("NOT CHECKED: the package index cannot be reached")


def test_a_set_that_does_not_resolve_fails_with_the_resolvers_words(tmp_path: Path) -> None:
    """A folder of packages stands for the index: one package asks for another in a version that nobody pins."""
    index = tmp_path / "index"
    for name, requires in (("asks", "asked==2"), ("asked", ""), ("packaging", "")):
        _wheel(index / name, name, requires)
    program = (
        "import sys, check_resolution as check; from pathlib import Path\n"
        "check.disagreements = list\n"
        f"check.REQUIREMENTS = Path({str(tmp_path / 'requirements.txt')!r})\n"
        "sys.exit(check.main())"
    )
    only_there = {"UV_DEFAULT_INDEX": index.as_uri(), "PYTHONPATH": str(SCRIPT.parent)}
    environment = os.environ | only_there
    outcomes = []
    for text in ("asked==1.0\n", "asks==1.0\nasked==1.0\n"):
        (tmp_path / "requirements.txt").write_text(text)
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        outcomes.append((run.returncode, "NOT RESOLVED" in run.stdout, "asks depend on asked==2" in run.stdout))
    assert outcomes == [(0, False, False), (1, True, True)], run.stderr


def _wheel(folder: Path, name: str, requires: str) -> None:
    """Make an empty wheel, release 1.0, for every platform, and the index's page of it."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(f'<a href="{name}-1.0-py3-none-any.whl">{name}-1.0-py3-none-any.whl</a>')
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
