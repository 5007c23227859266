"""A process that reads what others wrote can open no connection, dump no core and gain no privilege."""

import platform
import subprocess
import sys

import pytest

from tests.support.server import BACKEND

_TRIED = """
import ctypes, errno, json, os, resource, socket, subprocess, sys
from core.confinement import confine

def refusal(call):
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno]
    return None

def io_uring():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(425, 1, ctypes.create_string_buffer(120)) < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")

refused = confine()
child = "import socket, sys\\ntry: socket.socket()\\nexcept OSError as error: sys.exit(error.errno)"
print(json.dumps({
    "refused": refused,
    "families": {name: refusal(lambda: socket.socket(getattr(socket, name), socket.SOCK_DGRAM))
                 for name in ("AF_INET", "AF_INET6", "AF_UNIX")},
    "pair": refusal(socket.socketpair),
    "child": subprocess.run([sys.executable, "-c", child]).returncode,
    "io_uring": refusal(io_uring),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "no_new_privileges": "NoNewPrivs:\\t1" in open("/proc/self/status").read(),
}))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="no filter for this machine"
)
def test_the_network_core_dumps_and_privileges_are_given_up_for_good() -> None:
    import errno
    import json

    done = subprocess.run([sys.executable, "-c", _TRIED], cwd=BACKEND, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "refused": None,
        "families": {"AF_INET": "EAFNOSUPPORT", "AF_INET6": "EAFNOSUPPORT", "AF_UNIX": None},
        "pair": None,
        "child": errno.EAFNOSUPPORT,
        "io_uring": "ENOSYS",
        "core": [0, 0],
        "no_new_privileges": True,
    }


def test_a_machine_without_a_filter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, since the limit of core dumps stays."""
    tried = "import platform; platform.machine = lambda: 'vax'\nfrom core.confinement import confine; print(confine())"
    done = subprocess.run([sys.executable, "-c", tried], cwd=BACKEND, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("on vax has no filter here")
