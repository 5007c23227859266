"""Makes the virtual environment and installs the requirements: what `make setup` runs, with any Python from 3.11 on.

What would stop it halfway is looked at first: the system, the parts of Python, the package index, the disk. uv installs
where it is on the PATH, else pip. At the end the installed packages are imported, since two that do not belong together
install without a word. Only the standard library is used here: nothing else is installed yet.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GB = 1000**3
_SAYS_EVERY_S = 15
_PINS = (ROOT / "requirements.txt").read_text().splitlines()
_TORCH = next(line for line in _PINS if line.startswith("torch=="))
# Seconds to wait for an index that does not answer; pip multiplies it by the attempts.
_PATIENCE_S = 20


class NotReady(Exception):
    """Something that the installation needs is missing; the message says what, and what to do."""


@dataclass(frozen=True)
class Build:
    """What installing with one build of torch takes, measured on Linux x86_64 with Python 3.13.

    Attributes:
        name: As people call it.
        environment_bytes: The environment, tests and linters included.
        download_bytes: The files that the index sends. pip holds them in the temporary folder and in its cache.
    """

    name: str
    environment_bytes: int
    download_bytes: int


CUDA = Build("CUDA", int(6.3 * GB), int(3.0 * GB))
CPU = Build("CPU", int(3.4 * GB), int(0.7 * GB))


@dataclass(frozen=True)
class Installer:
    """The program that installs: uv where it is on the PATH, else pip.

    Attributes:
        uv: The path of uv, or None.
        environment: The folder of the virtual environment.
    """

    uv: str | None
    environment: Path

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.environment / "bin/python"

    def create(self) -> None:
        """Make the environment, anew where there is one that another Python made or that was moved."""
        if self._is_usable():
            return
        if self.uv is not None:
            command = [
                self.uv,
                "venv",
                "--quiet",
                "--clear",
                "--seed",
                "--python",
                sys.executable,
                str(self.environment),
            ]
        else:
            command = [sys.executable, "-m", "venv", "--clear", str(self.environment)]
        if subprocess.run(command, check=False).returncode != 0:
            raise NotReady(f"{self.environment} could not be made; what {command[0]} says is above.")

    def _is_usable(self) -> bool:
        if self._say("import sys; print(sys.version_info[:2])") != str(sys.version_info[:2]):
            return False
        has_pip = "import importlib.util; print(importlib.util.find_spec('pip') is not None)"
        return self.uv is not None or self._say(has_pip) == "True"

    def _say(self, program: str) -> str:
        """Run a program with the environment's Python; return what it prints, or nothing where that fails."""
        try:
            answer = subprocess.run([self.python, "-c", program], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return answer.stdout.strip()

    def run(self, action: str, *arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `pip ACTION` or `uv pip ACTION` on the environment.

        Args:
            action: install, uninstall.
            arguments: What follows.
            quiet: Whether its words are kept from the terminal.
        """
        if self.uv is not None:
            command = [self.uv, "pip", action, "--python", str(self.python), *arguments]
        else:
            yes = ["--yes"] if action == "uninstall" else []
            command = [str(self.python), "-m", "pip", "--disable-pip-version-check", action, *yes, *arguments]
        return subprocess.run(command, capture_output=quiet, text=True, check=False)

    def install(self, requirements: list[Path]) -> bool:
        """Install the files of requirements; tell whether that succeeded.

        uv with UV_TORCH_BACKEND looks for xformers and others on PyTorch's index alone, which lacks some for a CPU. So
        torch and torchvision come from there first, and the rest from the usual index keeps them.
        """
        files = [argument for file in requirements for argument in ("-r", str(file))]
        if self.uv is None:
            return self.run("install", *files).returncode == 0
        byte_code = "--compile-bytecode"  # as pip does; else the first start of the server and of each engine is slow
        backend = os.environ.pop("UV_TORCH_BACKEND", "")
        if backend:
            pins = [line for line in _PINS if line.startswith(("torch==", "torchvision=="))]
            first = self.run("install", "--torch-backend", backend, "--no-deps", byte_code, *pins)
            if first.returncode != 0:
                return False
        return self.run("install", byte_code, *files).returncode == 0

    def torch_installed(self) -> str | None:
        """Return the version of the torch that the environment has already; None if it has none."""
        return self._say("import importlib.metadata as m; print(m.version('torch'))") or None

    def torch_versions(self) -> str:
        """Ask the index which torch it has.

        Returns:
            The versions, as the installer prints them.

        Raises:
            NotReady: The index does not answer.
        """
        if self.uv is not None:
            command = [self.uv, "pip", "compile", "--quiet", "--no-deps", "--no-header", "--no-annotate"]
            command += ["--python", sys.executable, "-"]
        else:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
            command += ["--timeout", str(_PATIENCE_S), "index", "versions", "torch"]
        answer = subprocess.run(command, input=_TORCH, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise NotReady(
                f"The package index cannot be reached, or it has no torch for this Python ({sys.version.split()[0]}):\n"
                f"{answer.stderr.strip()}\n"
                "Installing needs a network, or a folder of packages that pip is told about (PIP_FIND_LINKS). Behind a "
                "proxy, set HTTPS_PROXY; for a mirror, PIP_INDEX_URL (with uv: UV_DEFAULT_INDEX)."
            )
        return answer.stdout


def check_system(platform: str = sys.platform) -> None:
    """Refuse native Windows.

    Raises:
        NotReady: This is Windows.
    """
    if platform == "win32":
        raise NotReady(
            "The server does not run natively on Windows: it ends its engines and locks its files in POSIX ways. "
            "Use WSL 2 (`wsl --install`), where an NVIDIA GPU works too."
        )


def check_python_parts(has: Callable[[str], object] = importlib.util.find_spec) -> None:
    """Refuse a Python that cannot make a virtual environment, as Debian's is without a package.

    Raises:
        NotReady: ensurepip is missing.
    """
    if has("venv") is None or has("ensurepip") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise NotReady(
            f"{sys.executable} has no venv with pip. On Debian and Ubuntu: sudo apt install python{version}-venv"
        )


def build_of(versions: str, platform: str = sys.platform) -> Build:
    """Tell which build of torch will be installed.

    Args:
        versions: What `Installer.torch_versions` gave; a build of its own says so after a plus, as 2.13.0+cpu.
        platform: As sys.platform. Only Linux has CUDA's libraries in the index.
    """
    return CPU if platform != "linux" or f"{_TORCH.split('==')[1]}+cpu" in versions else CUDA


def room_needed(build: Build, environment: Path, with_uv: bool, temporary: Path, cache: Path) -> dict[Path, int]:
    """Tell how many bytes each disk must have free.

    uv writes to its cache and links from there; pip writes downloads to the temporary folder and its cache as well.

    Returns:
        Bytes by a folder on the disk; a disk that several are on comes once.
    """
    parts = [(environment, build.environment_bytes)]
    if not with_uv:
        parts += [(temporary, build.download_bytes), (cache, build.download_bytes)]
    needed: dict[int, tuple[Path, int]] = {}
    for folder, size in parts:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        first, before = needed.get(there.stat().st_dev, (there, 0))
        needed[there.stat().st_dev] = (first, before + size)
    return dict(needed.values())


def check_disk(needed: dict[Path, int], build: Build, free: Callable[[Path], int]) -> None:
    """Refuse where the files would not fit.

    Args:
        needed: As `room_needed` gives it.
        build: The build of torch that was counted with.
        free: Gives the free bytes of the disk that a folder is on.

    Raises:
        NotReady: A disk has too little room.
    """
    for folder, size in needed.items():
        if free(folder) < size:
            smaller = (
                ""
                if build is CPU
                else f" A CPU build of torch takes {CPU.environment_bytes / GB:.1f} GB in place of "
                f"{CUDA.environment_bytes / GB:.1f}; the README says how to get one."
            )
            raise NotReady(
                f"{size / GB:.1f} GB are needed on the disk of {folder}, {free(folder) / GB:.1f} GB are free "
                f"(with the {build.name} build of torch; TMPDIR and PIP_CACHE_DIR can be on another disk).{smaller}"
            )


def bytes_on_disk(folder: Path) -> int:
    """Count the bytes of a folder's files on the disk; one that the installer renames meanwhile is left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).lstat().st_blocks * 512
    return total


@contextmanager
def progress(environment: Path) -> Iterator[None]:
    """Say every 15 seconds how much is installed: neither pip nor uv does while it unpacks."""
    done = threading.Event()
    start = time.monotonic()

    def say() -> None:
        while not done.wait(_SAYS_EVERY_S):
            size = bytes_on_disk(environment)
            print(f"... {time.monotonic() - start:.0f} s, {size / GB:.1f} GB installed", flush=True)

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


def import_error(python: Path, module: str) -> str | None:
    """Import a module in a fresh interpreter of the environment.

    Returns:
        The last line of what went wrong, or None.
    """
    run = subprocess.run(
        [python, "-W", "ignore", "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or ["no words"])[-1]


def check_imports(installer: Installer) -> None:
    """Import what does the work; take out a torchvision that was made for another build of torch.

    With such a pair, `import peft` and parts of transformers fail in every script of the environment. Unsloth requires
    torchvision; the service does not.

    Raises:
        NotReady: Something does not import.
    """
    if import_error(installer.python, "torch") is None and (error := import_error(installer.python, "torchvision")):
        installer.run("uninstall", "torchvision", quiet=True)
        print(
            f"torchvision was taken out again: it is made for another build of torch than the one here ({error}).\n"
            "The service needs none. Unsloth, which asks for it, runs on a GPU only. To have it all the same, install "
            "torchvision from the place that torch came from."
        )
    for module in ("torch", "transformers", "peft", "bitsandbytes", "fastapi"):
        if (error := import_error(installer.python, module)) is not None:
            raise NotReady(f"{module} was installed, but it does not import: {error}")


def make(environment: Path, requirements: list[Path]) -> None:
    """Check, create, install, import.

    Raises:
        NotReady: A step failed.
    """
    check_system()
    uv = shutil.which("uv")
    installer = Installer(uv, environment)
    if uv is None:
        check_python_parts()
    offered = installer.torch_versions()
    build = build_of(installer.torch_installed() or offered)
    cache = Path(os.environ.get("PIP_CACHE_DIR") or Path.home() / ".cache/pip")
    if not installer.python.exists():  # else most of it is there already
        needed = room_needed(build, environment.absolute(), uv is not None, Path(tempfile.gettempdir()), cache)
        check_disk(needed, build, lambda folder: shutil.disk_usage(folder).free)
    print(
        f"Installing into {environment} with {'uv' if uv else 'pip'}, Python {sys.version.split()[0]} and the "
        f"{build.name} build of torch: {build.environment_bytes / GB:.1f} GB. This takes minutes.",
        flush=True,
    )
    installer.create()
    with progress(environment):
        installed = installer.install(requirements)
    if not installed:
        free = shutil.disk_usage(environment).free
        raise NotReady(
            f"The installation ended before its end, as said above. {free / GB:.1f} GB of disk are free now. "
            "The same command goes on with what was downloaded."
        )
    check_imports(installer)


def main() -> None:
    """Read the command line, make the environment, and leave the mark that make looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("requirements", type=Path, nargs="+", help="files of requirements")
    parser.add_argument("--mark", type=Path, help="a file that is touched at the end")
    arguments = parser.parse_args()
    try:
        make(arguments.environment, arguments.requirements)
    except NotReady as error:
        raise SystemExit(f"\n{error}") from error
    if arguments.mark is not None:
        arguments.mark.touch()


if __name__ == "__main__":
    main()
