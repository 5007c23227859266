"""Starts engine processes: their environment, their pipes, and the thread that forks them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from core import allocator
from core.environment import without_secrets
from domain import protocol

_BACKEND = Path(__file__).resolve().parents[2]
# The first three are for glibc's allocator, where core/allocator.py finds no other. By default glibc gives freed
# tensors back to the kernel at once, which must then map them again at the next step. With these thresholds training
# is 1.11-1.25 times as fast.
ENGINE_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**50),  # large tensors are not worth a line in the log
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # an engine reads local files only; the server does the downloading
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    # Variables that change how Unsloth computes. These values are the ones that engine/unsloth_backend.py expects.
    "UNSLOTH_RETURN_LOGITS": "0",
    "UNSLOTH_RETURN_HIDDEN_STATES": "0",
    "UNSLOTH_FUSED_LORA_DROPOUT": "1",
    "UNSLOTH_USE_NEW_MODEL": "0",
    "UNSLOTH_ENABLE_FULL_FINETUNING": "0",
    "UNSLOTH_TILED_MLP": "0",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # torch then numbers GPUs as NVML does, and not the fastest first
}
# PR_SET_PDEATHSIG fires when the *thread* that forked ends. So a thread that never ends starts all engines.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-spawner")


def spawn(
    work_dir: Path, gpu_uuid: str | None, backend: str, nice: int
) -> tuple["subprocess.Popen[bytes]", BinaryIO, BinaryIO]:
    """Start `python -m engine` with a private pair of pipes.

    Args:
        work_dir: Where Unsloth may write the code that it generates.
        gpu_uuid: The one GPU that the engine sees; None for every one there is.
        backend: The back end that will load its base, or `none` for an engine that will hold none.
        nice: How far the engine gives way to other programs, beside the server's own place.

    Returns:
        The process, the pipe that takes its commands, and the pipe that gives its events.

    Raises:
        OSError: No process can be started.
    """
    return _spawner.submit(_spawn, work_dir, gpu_uuid, backend, nice).result()


def _spawn(
    work_dir: Path, gpu_uuid: str | None, backend: str, nice: int
) -> tuple["subprocess.Popen[bytes]", BinaryIO, BinaryIO]:
    """Start the process, on the spawner's thread."""
    command_read, command_write = os.pipe()
    event_read, event_write = os.pipe()
    environment = {
        **without_secrets(os.environ),
        **ENGINE_ENVIRONMENT,
        # Unsloth writes the code it generates to the working directory unless it is told where.
        "UNSLOTH_COMPILE_LOCATION": str(work_dir / "unsloth_compiled_cache"),
        protocol.BACKEND_VARIABLE: backend,
        protocol.COMMAND_FD_VARIABLE: str(command_read),
        protocol.EVENT_FD_VARIABLE: str(event_write),
        "PEFT_STUDIO_PARENT_PID": str(os.getpid()),
        "PEFT_STUDIO_ENGINE_NICE": str(nice),
    }
    if gpu_uuid is not None:
        # By uuid: an index depends on the GPUs that the server itself sees. Unsloth uses cuda:0 by name in places.
        environment["CUDA_VISIBLE_DEVICES"] = gpu_uuid
    elif backend == "none":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # it computes with no data, and takes no memory of a GPU
    elif library := allocator.preload():  # of no use where tensors are in a GPU's memory, and untried there
        environment["LD_PRELOAD"] = str(library)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", backend],  # the last word is for whoever lists processes
            cwd=_BACKEND,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(command_read, event_write),
            start_new_session=True,  # a terminal's Ctrl-C is for the server, which then ends its engines
        )
    except OSError:
        os.close(command_write)
        os.close(event_read)
        raise
    finally:
        os.close(command_read)
        os.close(event_write)
    return process, os.fdopen(command_write, "wb"), os.fdopen(event_read, "rb")
