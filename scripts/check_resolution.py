"""Resolves the requirements for every platform and Python that the README names: a part of `make check`.

Nothing is installed. The package index alone is asked, not the other places that this machine's pip may look at. Wheels
alone count: a package that would have to be compiled on a platform is a failure there.

Exit status:
    0: Everything resolves; or the index cannot be reached, which is said.
    1: The index can be reached and the set does not resolve somewhere; or the files do not agree with each other.
"""

import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lock_requirements import ROOT, TESTED_SET, files_of, packages_of
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REQUIREMENTS = ROOT / "backend/requirements.txt"  # the service, and what its tests need
MACOS = "14.0"  # the first that torch has a wheel for
PLATFORMS = {
    "Linux x86_64": "x86_64-manylinux_2_31",
    "Linux aarch64": "aarch64-manylinux_2_31",
    "Windows x86_64": "x86_64-pc-windows-msvc",
    f"macOS {MACOS} arm64": "aarch64-apple-darwin",
}
_OTHER_PLACES = ("UV_FIND_LINKS", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_TORCH_BACKEND")
_AT_ONCE = 4  # each waits for the index most of the time
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Resolution:
    """What resolving a set for one platform and Python gave.

    Attributes:
        platform: The platform, as PLATFORMS names it.
        python: Its Python, as "3.11".
        packages: How many packages would be installed; None where the set does not resolve.
        explanation: The resolver's words where it does not.
    """

    platform: str
    python: str
    packages: int | None
    explanation: str


def pythons() -> list[str]:
    """Give the minor releases that pyproject.toml's requires-python admits, as ["3.11", ...]."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    admitted = SpecifierSet(project["requires-python"])
    return [f"3.{minor}" for minor in range(100) if admitted.contains(f"3.{minor}.99")]


def _uv(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `uv pip compile`, which asks the index alone: no file of settings and no further place to look at."""
    environment = {name: value for name, value in os.environ.items() if name not in _OTHER_PLACES}
    environment |= {"MACOSX_DEPLOYMENT_TARGET": MACOS, "UV_PYTHON_DOWNLOADS": "never"}  # it fetches Pythons otherwise
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet"]
    command += ["--python", sys.executable, *arguments]
    return subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )


def resolve(requirements: Path, platform: str, python: str) -> Resolution:
    """Resolve a file of requirements for one platform and Python."""
    options = ("--only-binary", ":all:", "--no-header", "--no-annotate", "--python-version", python)
    for _ in range(2):  # a connection that broke once is no verdict
        run = _uv(*options, "--python-platform", PLATFORMS[platform], str(requirements))
        if run.returncode == 0:
            break
    resolved = len(run.stdout.splitlines()) if run.returncode == 0 else None
    return Resolution(platform, python, resolved, run.stderr.strip())


def index_reached() -> str | None:
    """Ask the index for one small package, past every cache.

    Returns:
        None if it answered, else the words of what went wrong.
    """
    run = _uv("--no-deps", "--no-cache", "-", given="packaging\n")
    return None if run.returncode == 0 else run.stderr.strip()


def disagreements() -> list[str]:
    """Say where the written files differ from pyproject.toml or from one another; needs no network."""
    compiled = packages_of(TESTED_SET.read_text())
    wrong = [
        f"{path} is not what requirements/tested-set.txt gives; run `make lock`."
        for path, text in files_of(compiled).items()
        if (ROOT / path).read_text() != text
    ]
    versions = [Requirement(package.line) for package in compiled]
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for wanted in map(Requirement, [*document["project"]["dependencies"], *document["dependency-groups"]["dev"]]):
        pins = [pin for pin in versions if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        pinned = [next(iter(pin.specifier)).version for pin in pins]
        if not pinned or not all(wanted.specifier.contains(version) for version in pinned):
            wrong.append(f"pyproject.toml asks for {wanted}, the tested set has {pinned or 'none'}; run `make lock`.")
    return wrong


def main() -> int:
    """Check and print one line a platform; return the exit status."""
    wrong = disagreements()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        asked = [(REQUIREMENTS, platform, python) for platform in PLATFORMS for python in pythons()]
        resolutions = list(pool.map(resolve, *zip(*asked, strict=True)))
    refused = [resolution for resolution in resolutions if resolution.packages is None]
    if refused and (unreachable := index_reached()) is not None:
        print(f"NOT CHECKED: the package index cannot be reached, so nobody knows what resolves.\n{unreachable}")
        return int(bool(wrong))
    for platform in PLATFORMS:
        answers = [resolution for resolution in resolutions if resolution.platform == platform]
        print(f"{platform:17} " + "  ".join(f"{one.python}: {one.packages or 'NOT RESOLVED'}" for one in answers))
    for explanation in dict.fromkeys(resolution.explanation for resolution in refused):
        where = [f"{one.platform}, {one.python}" for one in refused if one.explanation == explanation]
        print(f"\n{'; '.join(where)}:\n{explanation}")
    return int(bool(wrong or refused))


if __name__ == "__main__":
    raise SystemExit(main())
