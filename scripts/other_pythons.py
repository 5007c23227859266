"""Runs the fast tests with every other Python that this machine has and the requirements name: `make test-pythons`.

Each gets an environment of its own, `.venv-3.12` and so on, installed by uv with the index's own build of torch.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from check_resolution import pythons
from lock_requirements import ROOT

_OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"


def interpreter(version: str) -> str | None:
    """Find a Python that runs: on the PATH, or where pyenv and uv keep theirs.

    Args:
        version: As "3.12".

    Returns:
        Its path, or None.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    on_path = shutil.which(f"python{version}")
    candidates = [Path(on_path)] if on_path else []
    for candidate in (*candidates, *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        answer = subprocess.run([candidate, "-c", asked], capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:  # pyenv's shims are on the PATH for versions that are switched off
            return str(candidate)
    return None


def tested(version: str, python: str) -> bool:
    """Make the environment and run the fast tests in it; tell whether both succeeded."""
    environment = ROOT / f".venv-{version}"
    with_uv = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    make = [python, "scripts/make_environment.py", str(environment), "backend/requirements.txt"]
    if subprocess.run(make, cwd=ROOT, env=with_uv, check=False).returncode != 0:
        return False
    tests = [str(environment / "bin/python"), "-m", "pytest", "tests/", "-n", "2", "--dist", "loadfile"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(tests, cwd=ROOT / "backend", env=one_thread, check=False).returncode == 0


def main() -> int:
    """Test with each; return the exit status."""
    others = {version: interpreter(version) for version in pythons() if version != _OWN}
    outcomes = {}
    for version, python in others.items():
        if python is not None:
            print(f"Python {version}: {python}", flush=True)
            outcomes[version] = tested(version, python)
    for version in others:
        words = {None: "not on this machine", True: "the fast tests pass", False: "FAILED"}
        print(f"Python {version}: {words[outcomes.get(version)]}")
    return int(not all(outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
