"""A root directory to build and run an image in, without a container engine: layers over this machine's own system.

This machine's /usr, /etc, /var and /opt stand for the base image, with the running Python first on the PATH. They are
seen through overlay mounts: what a step writes goes into a folder of its own, and this machine stays as it was. Mounts
need root and a mount namespace of this process's own, and end with it.
"""

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

OVERLAID = ("usr", "etc", "var", "opt")
_PARTS = ("", *OVERLAID)  # "" is what lies directly below /
_LOOKED_UP = (
    "etc/resolv.conf",
    "etc/hosts",
)  # in a container these are mounts of their own, which an overlay does not see
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h; os.unshare comes with Python 3.12
_SET_FLAGS, _UP = 0x8914, 0x1  # SIOCSIFFLAGS of linux/sockios.h, IFF_UP of linux/if.h


class Base:
    """What stands for the base image: the lowest layer.

    Args:
        folder: An empty folder, on no part of the system that is overlaid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("proc", "sys", "dev", "run", "root", "home", *OVERLAID):
            (self._top / name).mkdir(parents=True)
        (self._top / "tmp").mkdir()
        (self._top / "tmp").chmod(0o1777)
        for entry in Path("/").iterdir():
            if entry.is_symlink():  # /bin to usr/bin
                (self._top / entry.name).symlink_to(entry.readlink())
        self.python_folder = Path(sys.base_prefix)
        if not self.has_python:  # a folder that every user can pass through, whoever may enter this machine's
            (self._top / self.python_folder.relative_to("/")).mkdir(parents=True)

    @property
    def has_python(self) -> bool:
        """Whether the running Python lies in a part that is overlaid."""
        return self.python_folder.parts[1] in OVERLAID

    @property
    def _top(self) -> Path:
        return self.folder / "top"

    @property
    def path(self) -> str:
        """The variable PATH of the base image."""
        return f"{self.python_folder / 'bin'}:{_PATH}"

    def lower(self, part: str) -> str:
        """Give the folder below every layer for one part."""
        return str(Path("/", part) if part else self._top)


class Root:
    """The root directory of a stage.

    Args:
        folder: An empty folder for what the stage writes.
        base: The lowest layer.
        parent: The stage that it begins from, written to no longer; None for the base.
    """

    def __init__(self, folder: Path, base: Base, parent: "Root | None") -> None:
        self._base = base
        self._written = folder / "written"
        self._below: list[Path] = [parent._written, *parent._below] if parent is not None else []
        self.path = folder / "root"
        self.path.mkdir(parents=True)
        for part in _PARTS:
            written, work = self._written / (part or "top"), folder / "work" / (part or "top")
            written.mkdir(parents=True)
            work.mkdir(parents=True)
            above = [str(layer / (part or "top")) for layer in self._below]
            lower = ":".join([*above, base.lower(part)])
            target = self.path / part
            written.chmod(0o755)
            _mount("-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={written},workdir={work}", str(target))
        for name in ("dev", "sys"):
            _mount("--rbind", f"/{name}", str(self.path / name))
        for name in _LOOKED_UP:
            if Path("/", name).is_file():
                (self.path / name).unlink(missing_ok=True)  # it may be a link that leads nowhere here
                (self.path / name).touch()
                _mount("--bind", f"/{name}", str(self.path / name))
        if not self._base.has_python:
            self.show(self._base.python_folder, str(self._base.python_folder))

    def show(self, source: Path, target: str) -> None:
        """Let a folder of this machine be seen in the root, and be written to where it may be."""
        place = self.inside(target)
        place.mkdir(parents=True, exist_ok=True)
        _mount("--bind", str(source), str(place))

    def inside(self, path: str) -> Path:
        """Give where a path of the root lies on this machine."""
        return self.path / path.lstrip("/")

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], folder: str, user: str
    ) -> subprocess.Popen[bytes]:
        """Start a program in the root as the first process of a process namespace; all of it ends with that process.

        Args:
            command: The program and its arguments.
            environment: All its variables.
            folder: The working directory, a path of the root.
            user: Numeric user and group, as "10001:10001"; root keeps its capabilities, others have none.
        """
        uid, gid = user.split(":")
        identity = ["--reuid", uid, "--regid", gid, "--clear-groups"]
        if uid != "0":
            identity += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        namespace = [shutil.which("unshare") or "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        namespace += ["--root", str(self.path), "--wd", folder]
        whole = [*namespace, "setpriv", *identity, *command]
        return subprocess.Popen(whole, env=environment, stdin=subprocess.DEVNULL)


def first_process(started: subprocess.Popen[bytes]) -> int:
    """Give the process id of the program that `Root.start` started, as this machine numbers it.

    Raises:
        ProcessLookupError: It has not begun, or has ended.
    """
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    if not children:
        raise ProcessLookupError("no process")
    return int(children[0])


def leave_the_network() -> None:
    """Give this process a network of its own, with nothing but the loopback interface.

    Raises:
        OSError: This user or this system does not allow it.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH14x", b"lo", _UP))


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
