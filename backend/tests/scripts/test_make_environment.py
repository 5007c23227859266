"""What stops an installation is said at its first step; what was installed is imported at its end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lock_requirements import ROOT
from make_environment import (
    CPU,
    CUDA,
    GB,
    Installer,
    NotReady,
    build_of,
    bytes_on_disk,
    check_disk,
    check_imports,
    check_python_parts,
    check_system,
    import_error,
    room_needed,
)

_OLD_PYTHONS = sorted((Path.home() / ".pyenv/versions").glob("3.[6-9].*/bin/python"))


def test_native_windows_is_refused_with_what_to_use() -> None:
    with pytest.raises(NotReady, match="WSL 2"):
        check_system("win32")
    check_system("linux")
    check_system("darwin")


def test_a_python_without_ensurepip_is_refused_with_debians_package() -> None:
    with pytest.raises(NotReady, match=r"apt install python3\.\d+-venv"):
        check_python_parts(lambda module: None if module == "ensurepip" else module)
    check_python_parts(lambda module: module)


@pytest.mark.parametrize(
    ("versions", "platform", "build"),
    [
        ("Available versions: 2.13.0+cpu, 2.13.0", "linux", CPU),
        ("torch==2.13.0+cpu", "linux", CPU),
        ("torch==2.13.0", "linux", CUDA),
        ("Available versions: 2.14.0+cpu, 2.13.0", "linux", CUDA),
        ("torch==2.13.0", "darwin", CPU),
    ],
)
def test_the_build_of_torch_is_told_by_its_version(versions: str, platform: str, build: object) -> None:
    assert build_of(versions, platform) is build


def test_what_pip_writes_beside_the_environment_counts_where_it_is_on_the_same_disk(tmp_path: Path) -> None:
    parts = (tmp_path / "env", False, tmp_path / "tmp", tmp_path / "cache")
    [(folder, size)] = room_needed(CUDA, *parts).items()
    assert (folder, size) == (tmp_path, CUDA.environment_bytes + 2 * CUDA.download_bytes)
    [(_, with_uv)] = room_needed(CUDA, tmp_path / "env", True, tmp_path, tmp_path).items()
    assert with_uv == CUDA.environment_bytes
    elsewhere = Path("/dev/shm")  # a disk of its own on Linux
    if elsewhere.stat().st_dev != tmp_path.stat().st_dev:
        needed = room_needed(CUDA, tmp_path / "env", False, elsewhere, tmp_path / "cache")
        assert needed == {
            tmp_path: CUDA.environment_bytes + CUDA.download_bytes,
            elsewhere: CUDA.download_bytes,
        }


def test_a_disk_that_is_too_small_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"9\.0 GB are needed .* 2\.5 GB are free .* A CPU build of torch takes 3\.4 GB"):
        check_disk({tmp_path: 9 * GB}, CUDA, lambda _folder: int(2.5 * GB))
    check_disk({tmp_path: 9 * GB}, CUDA, lambda _folder: 9 * GB)


def test_an_index_that_cannot_be_reached_is_said_before_anything_is_made(tmp_path: Path) -> None:
    environment = tmp_path / "env"
    made = _make(environment, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull})
    assert made.returncode == 1
    assert "The package index cannot be reached" in made.stderr
    assert "HTTPS_PROXY" in made.stderr
    assert "Traceback" not in made.stderr
    assert not environment.exists()


def _make(environment: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts/make_environment.py"), str(environment), "requirements.txt"]
    without_uv = os.environ | {"PATH": "/usr/bin:/bin"} | variables
    return subprocess.run(script, cwd=ROOT, env=without_uv, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["setup", "quickstart", "serve", "test", "check"])
def test_a_python_that_is_missing_is_named_by_every_command(target: str, tmp_path: Path) -> None:
    command = ["make", target, "PYTHON=python3.99", f"VENV={tmp_path}/env"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "python3.99 is not installed. Python 3.11 to 3.14 is needed." in run.stdout


@pytest.mark.skipif(not _OLD_PYTHONS or shutil.which("make") is None, reason="no older Python is installed")
@pytest.mark.parametrize("python", _OLD_PYTHONS, ids=lambda path: path.parent.parent.name)
def test_an_older_python_is_refused_in_words(python: Path, tmp_path: Path) -> None:
    command = ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path}/env"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "Python 3.11 to 3.14 is needed" in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


def test_with_uv_a_build_of_torch_comes_first_and_the_rest_from_the_usual_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PyTorch's own index uv would look for packages that are not there."""
    told = tmp_path / "told"
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "${{UV_TORCH_BACKEND-none}} $@" >> {told}\n')
    uv.chmod(0o755)
    monkeypatch.setenv("UV_TORCH_BACKEND", "cpu")
    assert Installer(str(uv), tmp_path / "env").install([Path("requirements.txt")])
    torch, rest = told.read_text().splitlines()
    assert torch.startswith("none pip install") and "--torch-backend cpu --no-deps" in torch
    assert [word.split("==")[0] for word in torch.split()[-2:]] == ["torch", "torchvision"]
    assert rest.startswith("none pip install") and rest.endswith("-r requirements.txt")


class _Environment:
    """An environment in which modules are files that this test writes."""

    def __init__(self, folder: Path) -> None:
        self.modules = folder / "modules"
        self.modules.mkdir()
        (folder / "bin").mkdir()
        python = folder / "bin/python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={self.modules} exec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
        self.installer = Installer(None, folder)

    def has(self, **modules: str) -> None:
        """Write modules with these sources; pip is one of them, and writes down what it was told."""
        told = self.modules.parent / "told"
        pip = f"import sys, pathlib; pathlib.Path({str(told)!r}).write_text(' '.join(sys.argv[1:]))"
        for name, source in {"pip": pip, **modules}.items():
            (self.modules / f"{name}.py").write_text(source)

    @property
    def told_pip(self) -> str:
        """What pip was told, or nothing."""
        told = self.modules.parent / "told"
        return told.read_text() if told.exists() else ""


_ALL_WELL = dict.fromkeys(("torch", "torchvision", "transformers", "peft", "bitsandbytes", "fastapi"), "")


def test_a_torchvision_of_another_build_is_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = _Environment(tmp_path)
    environment.has(**_ALL_WELL | {"torchvision": "raise RuntimeError('operator torchvision::nms does not exist')"})
    check_imports(environment.installer)
    assert environment.told_pip.endswith("uninstall --yes torchvision")
    assert "operator torchvision::nms does not exist" in capsys.readouterr().out


def test_what_belongs_together_stays(tmp_path: Path) -> None:
    environment = _Environment(tmp_path)
    environment.has(**_ALL_WELL)
    check_imports(environment.installer)
    assert environment.told_pip == ""


@pytest.mark.parametrize("broken", ["torch", "transformers", "peft", "bitsandbytes", "fastapi"])
def test_what_does_not_import_is_named(tmp_path: Path, broken: str) -> None:
    environment = _Environment(tmp_path)
    environment.has(**_ALL_WELL | {broken: "raise ImportError('libgomp.so.1: cannot open shared object file')"})
    with pytest.raises(NotReady, match=f"{broken} was installed, but it does not import: .*libgomp"):
        check_imports(environment.installer)
    assert environment.told_pip == ""


@pytest.mark.engine
@pytest.mark.skipif(
    not (Path(sys.prefix) / ".installed").exists(), reason="this environment was not made by `make setup`"
)
def test_what_is_installed_here_imports_as_a_users_script_would() -> None:
    """In the environment that these tests run in; `make setup` made it."""
    modules = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "transformers.models.clip")
    errors = {module: import_error(Path(sys.executable), module) for module in modules}
    assert errors == dict.fromkeys(modules)


def test_what_is_installed_is_counted_while_files_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").write_bytes(b"x" * 8192)
    expected = bytes_on_disk(tmp_path)
    assert expected >= 8192
    monkeypatch.setattr(os, "walk", lambda folder: [(str(folder), [], ["there", "gone"])])
    assert bytes_on_disk(tmp_path) == expected
