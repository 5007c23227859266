"""Refuse engines and torch in this process.

What was refused is written down too, because whoever is refused may handle the error.
"""

import os
import sys
from itertools import pairwise

RECORD = "NO_ENGINE_RECORD"  # the variable that names the file
ENGINE = ("-m", "engine")  # what services/engines/spawning.py starts
IMPORTS = ("torch", "transformers")  # seconds each


def refused(event: str, arguments: tuple[object, ...]) -> str | None:
    """Return what an event of Python's audit starts that is refused; None for every other event."""
    if event == "import" and arguments[0] in IMPORTS:
        return f"import {arguments[0]}"
    if event == "subprocess.Popen" and isinstance(arguments[1], list | tuple):
        command = tuple(str(part) for part in arguments[1])
        if ENGINE in pairwise(command):
            return " ".join(command)
    return None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    what = refused(event, arguments)
    if what is None or RECORD not in os.environ:
        return
    descriptor = os.open(os.environ[RECORD], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{what}, in {' '.join(sys.orig_argv)[:300]}\n".encode())
    os.close(descriptor)
    raise PermissionError(f"The fast tests start no engine and do not import torch: {what}")


def install() -> None:
    """Refuse from here on, for as long as the process lives and the variable is set."""
    sys.addaudithook(_hook)
