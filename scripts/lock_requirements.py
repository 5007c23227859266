"""Writes the exact set of packages from the names and bounds of pyproject.toml: `make lock`.

Versions that the files hold stay while they satisfy pyproject.toml; `make lock UPGRADE=1` takes the newest.

Files:
    requirements/tested-set.txt: Everything, with hashes, for every platform and Python: what the tests ran with.
    requirements.txt: The service, for pip, with whatever build of torch pip is pointed at.
    requirements/cuda-constraints.txt: The libraries that a CUDA build of torch brings; a CPU build brings none of them.
    requirements/dev.txt: What tests and linters need beside the service.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTED_SET = ROOT / "requirements/tested-set.txt"
_FIRST_PYTHON = "3.11"
_MADE_BY = "# Written by `make lock` from the names and bounds in pyproject.toml: change those.\n"
_SERVICE_NEED = "peft-studio-backend (pyproject.toml)"  # how uv's remarks name the two lists of pyproject.toml
_DEV_NEED = "peft-studio-backend (pyproject.toml:dev)"
# torch pins these exactly or within a release; nvidia-ml-py is a need of ours.
_TORCH_LIBRARY = re.compile(r"(nvidia|cuda)-(?!ml-py)|triton(?!-windows)")

_SERVICE_HEAD = f"""\
{_MADE_BY}\
# The service, in the versions that the tests ran with. The same set with hashes is requirements/tested-set.txt.
# Which build of torch comes is pip's to decide: on Linux the index has one for CUDA, which brings CUDA's libraries.
-c requirements/cuda-constraints.txt
"""
_CUDA_HEAD = f"""\
{_MADE_BY}\
# Constraints: nothing here is installed by itself. A CUDA build of torch requires these; a CPU build does not.
"""
_DEV_HEAD = f"""\
{_MADE_BY}\
# What tests, linters and the checks of the requirements need beside the service.
"""


@dataclass
class Package:
    """One package of the compiled set.

    Attributes:
        line: Name, exact version and marker, as a line of a requirements file.
        required_by: The names of the packages that require it, and the lists of pyproject.toml that name it.
    """

    line: str
    required_by: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The package's name, normalised."""
        return self.line.split("==")[0]

    @property
    def of_torch(self) -> bool:
        """Whether it is a library that torch's CUDA build brings."""
        return _TORCH_LIBRARY.match(self.name) is not None


def packages_of(compiled: str) -> list[Package]:
    """Read a file that `uv pip compile` wrote, with remarks in its split style.

    Args:
        compiled: The file's text.

    Returns:
        One a line that pins a package; a package that two Pythons have in two versions comes twice.
    """
    packages: list[Package] = []
    for line in compiled.splitlines():
        if line and not line.startswith((" ", "#", "-")):
            packages.append(Package(line.removesuffix("\\").strip()))
        elif line.lstrip().startswith("#") and packages:
            remark = line.strip().removeprefix("#").strip().removeprefix("via").strip()
            packages[-1].required_by |= {remark} - {""}
    return packages


def needed_by(packages: list[Package], need: str) -> set[str]:
    """Name every package that a list of pyproject.toml asks for, itself or through others."""
    names = {package.name for package in packages if need in package.required_by}
    while True:
        further = {package.name for package in packages if package.required_by & names} - names
        if not further:
            return names
        names |= further


def files_of(packages: list[Package]) -> dict[str, str]:
    """Divide the compiled set into the files that pip reads.

    Returns:
        The text of each file by its path from the top of the project.
    """
    service = needed_by(packages, _SERVICE_NEED)
    asked = [package for package in packages if package.name in service and not package.of_torch]
    direct = [package.line for package in asked if _SERVICE_NEED in package.required_by]
    brought = [package.line for package in asked if _SERVICE_NEED not in package.required_by]
    cuda = [package.line for package in packages if package.name in service and package.of_torch]
    dev = [package.line for package in packages if package.name not in service]
    return {
        "requirements.txt": "\n".join((_SERVICE_HEAD, *direct, "\n# What these require.", *brought, "")),
        "requirements/cuda-constraints.txt": "\n".join((_CUDA_HEAD, *cuda, "")),
        "requirements/dev.txt": "\n".join((_DEV_HEAD, *dev, "")),
    }


def _compile(upgrade: bool) -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--universal", "--no-header"]
    command += ["--python-version", _FIRST_PYTHON, "--no-python-downloads", "--group", "dev", "--generate-hashes"]
    command += ["--upgrade"] if upgrade else []
    command += ["--output-file", str(TESTED_SET), "pyproject.toml"]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise SystemExit("requirements/ is as it was: pyproject.toml does not resolve, see above.")
    TESTED_SET.write_text(_MADE_BY + TESTED_SET.read_text())


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    _compile(parser.parse_args().upgrade)
    for path, text in files_of(packages_of(TESTED_SET.read_text())).items():
        (ROOT / path).write_text(text)


if __name__ == "__main__":
    main()
