"""Fetches the scripts and styles of others that the pages use, or checks those that are there.

The files are part of the repository, so neither a user nor the server needs Node. `npm pack` fetches a package as the
registry has it; nothing of it is run. A package whose digest is another than the one below is refused.

    vendor_web.py           check the files that are there against `vendored.json`
    vendor_web.py --fetch   fetch every package again (needs npm), and write the files and `vendored.json`
"""

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_STATIC = "backend/web/static/vendor"
_TESTS = "backend/tests/browser/vendor"
RECORD = ROOT / "backend/web/vendored.json"


@dataclass(frozen=True)
class Package:
    """A package of npm.

    Attributes:
        sha512: Of its archive in base64, as npm's own `integrity` has it.
        files: Which of its files are taken; licences among them.
        folder: Where they are put, from the top of the project.
    """

    name: str
    version: str
    sha512: str
    files: tuple[str, ...]
    folder: str = _STATIC

    @property
    def target(self) -> str:
        """The folder of this version."""
        return f"{self.folder}/{self.name}-{self.version}"


PACKAGES = (
    Package(
        "htmx.org",
        "2.0.11",
        "Thx/WtpeOQqSrqBCw/A1cwGJGg4UrVa3+sW0GmrM3p4gJgO89ecH4qtbnyzDDWFvBTqjnIMCgELTNt636dtamA==",
        ("dist/htmx.min.js", "LICENSE"),
    ),
    Package(
        "uplot",
        "1.6.32",
        "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        ("dist/uPlot.iife.min.js", "dist/uPlot.min.css", "LICENSE"),
    ),
    Package(
        "swagger-ui-dist",
        "5.35.0",
        "U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ==",
        ("swagger-ui-bundle.js", "swagger-ui-bundle.js.LICENSE.txt", "swagger-ui.css", "LICENSE", "NOTICE"),
    ),
    Package(
        "axe-core",
        "4.14.1",
        "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
        ("axe.min.js", "LICENSE", "LICENSE-3RD-PARTY.txt"),
        _TESTS,
    ),
)


class WrongDigest(Exception):
    """A package or a file is not the one that it should be."""


def taken(package: Package, archive: bytes) -> dict[str, bytes]:
    """Return the files that are taken from a package's archive, by their names without folders.

    Raises:
        WrongDigest: The archive is another one.
    """
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != package.sha512:
        raise WrongDigest(f"{package.name} {package.version}: sha512 is {found}, not {package.sha512}")
    files: dict[str, bytes] = {}
    with tempfile.TemporaryFile() as copy:
        copy.write(archive)
        copy.seek(0)
        with tarfile.open(fileobj=copy, mode="r:gz") as tar:
            for name in package.files:
                member = tar.extractfile(f"package/{name}")
                if member is None:
                    raise WrongDigest(f"{package.name} {package.version} has no file {name}")
                files[Path(name).name] = member.read()
    return files


def fetch() -> None:
    """Fetch every package, and write its files and the record of their digests."""
    digests: dict[str, str] = {}
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(folder).iterdir()
            files = taken(package, archive.read_bytes())
        target = ROOT / package.target
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (target / name).write_bytes(content)
            digests[f"{package.target}/{name}"] = hashlib.sha256(content).hexdigest()
    RECORD.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")


def problems() -> list[str]:
    """Return one line for each file that is not as recorded, is missing, or is there without being recorded."""
    recorded: dict[str, str] = json.loads(RECORD.read_text())
    there = {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in (_STATIC, _TESTS)
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    wanted = {f"{package.target}/{Path(name).name}" for package in PACKAGES for name in package.files}
    return [
        *(f"{path}: not recorded" for path in sorted(there.keys() - recorded.keys())),
        *(f"{path}: missing" for path in sorted(recorded.keys() - there.keys())),
        *(
            f"{path}: another content"
            for path in sorted(recorded.keys() & there.keys())
            if there[path] != recorded[path]
        ),
        *(f"{path}: named by scripts/vendor_web.py, not recorded" for path in sorted(wanted - recorded.keys())),
        *(f"{path}: recorded, not named by scripts/vendor_web.py" for path in sorted(recorded.keys() - wanted)),
    ]


def main() -> int:
    """Fetch or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", action="store_true", help="fetch every package again")
    if parser.parse_args().fetch:
        fetch()
    found = problems()
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
