"""What a process that reads what others wrote gives up first: the network, new privileges, core dumps.

An engine needs pipes, files and perhaps a GPU, and the reader of datasets less. A server that runs without root cannot
put them into a container. But every process may give up system calls for good (seccomp), and what it starts has given
them up as well.
"""

import ctypes
import errno
import platform
import resource
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
# linux/seccomp.h. Without the last, some kernels slow the process down.
_SECCOMP_SET_MODE_FILTER, _ALL_THREADS, _SPEC_ALLOW = 1, 1, 4
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h: ld abs, jeq, jge, ret
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, on little-endian machines
_AF_UNIX, _AF_NETLINK = 1, 16  # to itself and its workers; to the kernel, which tells of devices
_X32 = 0x40000000  # the same calls again under other numbers, on x86-64


@dataclass(frozen=True)
class _Calls:
    """The numbers of a machine's system calls. Source: linux/audit.h, asm/unistd.h."""

    architecture: int
    socket: int
    seccomp: int
    io_uring_setup: int = 425  # it opens sockets without the call for it
    x32: bool = False


_MACHINES = {
    "x86_64": _Calls(0xC000003E, socket=41, seccomp=317, x32=True),
    "aarch64": _Calls(0xC00000B7, socket=198, seccomp=277),
}


def confine() -> str | None:
    """Give up, for this process and those that it will start, what they do not need.

    Returns:
        Why the network could not be given up, or None.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold the data that it trains on
    calls = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or calls is None:
        return f"{platform.system()} on {platform.machine()} has no filter here"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return f"prctl(PR_SET_NO_NEW_PRIVS): {errno.errorcode.get(ctypes.get_errno())}"
    return _filter(libc, calls)


def _filter(libc: ctypes.CDLL, calls: _Calls) -> str | None:
    program = _program(calls)
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: how many instructions there are, and where.
    described = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)))
    flags = _ALL_THREADS | _SPEC_ALLOW
    if libc.syscall(calls.seccomp, _SECCOMP_SET_MODE_FILTER, flags, described) == 0:
        return None
    return f"seccomp: {errno.errorcode.get(ctypes.get_errno())}"


def _program(calls: _Calls) -> bytes:
    """Return the filter as the kernel reads it: sockets of the network cannot be made, everything else can."""
    refused = [
        *_load(_ARCHITECTURE),
        *_unless(_EQUAL, calls.architecture, _refuse(errno.EPERM)),
        *_load(_NUMBER),
    ]
    if calls.x32:
        refused += _if(_AT_LEAST, _X32, _refuse(errno.ENOSYS))
    refused += _if(_EQUAL, calls.io_uring_setup, _refuse(errno.ENOSYS))
    families = [
        *_load(_FIRST_ARGUMENT),
        *_if(_EQUAL, _AF_UNIX, _answer(_ALLOW)),
        *_if(_EQUAL, _AF_NETLINK, _answer(_ALLOW)),
        *_refuse(errno.EAFNOSUPPORT),  # as on a machine that has no network at all
    ]
    return b"".join([*refused, *_if(_EQUAL, calls.socket, families), *_answer(_ALLOW)])


def _load(offset: int) -> list[bytes]:
    return [struct.pack("HBBI", _LOAD, 0, 0, offset)]


def _answer(action: int) -> list[bytes]:
    return [struct.pack("HBBI", _RETURN, 0, 0, action)]


def _refuse(number: int) -> list[bytes]:
    return _answer(_ERRNO | number)


def _if(test: int, value: int, then: Sequence[bytes]) -> list[bytes]:
    return [struct.pack("HBBI", test, 0, len(then), value), *then]


def _unless(test: int, value: int, then: Sequence[bytes]) -> list[bytes]:
    return [struct.pack("HBBI", test, len(then), 0, value), *then]
