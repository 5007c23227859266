"""A PostgreSQL of the test's own, from the distribution's package; skipped where there is none."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.server import free_port


def _program(name: str) -> str:
    found = shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    return found


class Postgres:
    """A server on a free port, with its data below a folder."""

    def __init__(self, folder: Path) -> None:
        self.port, self._data, self._log = free_port(), folder / "data", folder / "log"
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "-D", str(self._data), "-U", "studio", "--auth=trust", "--no-sync", "-E", "UTF8")

    @property
    def url(self) -> str:
        return f"postgresql://studio@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self._run("pg_ctl", "-D", str(self._data), "-l", str(self._log), "-o", options, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "stop")

    def _run(self, name: str, *arguments: str) -> None:
        command = [_program(name), *arguments]
        if os.getuid() == 0:  # it refuses to run as root
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        # To files: the server would keep a pipe open for as long as it runs.
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/")


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a server for the length of the block."""
    # Not below pytest's own folder, which is closed to other users than the one who runs the tests.
    with tempfile.TemporaryDirectory(prefix="peft-studio-postgres-") as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
