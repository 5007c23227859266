"""Runs the torch side of the CUDA validation in a process of its own, so that a crash is an answer too."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_BACKEND = Path(__file__).resolve().parent.parent
_LIMIT_S = 180  # importing Unsloth alone takes 10 s, and a first CUDA context several
RESULT_FD_VARIABLE = "PEFT_STUDIO_RESULT_FD"


@dataclass(frozen=True)
class CudaCheck:
    """One check: what was found, and what to do about it."""

    name: str
    status: Literal["pass", "fail", "warn", "skip"]
    detail: str
    fix: str | None


def run_cuda_checks(
    command: tuple[str, ...] = ("-m", "engine.cuda_checks"), limit_s: float = _LIMIT_S
) -> list[CudaCheck]:
    """Run the checks; the process's death or silence becomes a failed check.

    The result comes on a pipe of its own, so whatever the libraries print cannot be taken for it.
    """
    read, write = os.pipe()
    with os.fdopen(read, "rb") as results, tempfile.TemporaryDirectory() as scratch:
        try:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=_BACKEND,
                env={**os.environ, RESULT_FD_VARIABLE: str(write), "UNSLOTH_COMPILE_LOCATION": scratch},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(write,),
            )
        finally:
            os.close(write)
        try:
            _, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return [CudaCheck("torch", "fail", f"The checks did not end within {limit_s:g} s.", "Restart the driver.")]
        document = results.read()
    if process.returncode != 0 or not document:
        tail = " | ".join(errors.decode("utf-8", "replace").strip().splitlines()[-3:])
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        return [CudaCheck("torch", "fail", f"The checks ended with {how}: {tail}", "Reinstall torch for this driver.")]
    return [CudaCheck(**check) for check in json.loads(document)]
