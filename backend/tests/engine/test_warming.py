"""What an engine does beforehand, and how it knows that it holds no GPU."""

import random
import subprocess
import sys
from typing import Any

import pytest

from engine.warming import held_contexts, warm_up
from tests.support.server import BACKEND


class DriverDouble:
    """libcuda with some GPUs; `active` says of each whether this process holds a context there."""

    def __init__(self, active: list[bool], initialised: bool = True) -> None:
        self._active, self._initialised = active, initialised

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self._active)
        return 0 if self._initialised else 3  # CUDA_ERROR_NOT_INITIALIZED

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 10 + ordinal
        return 0

    def cuDevicePrimaryCtxGetState(self, device: Any, flags: Any, active: Any) -> int:
        active._obj.value = int(self._active[device.value - 10])
        return 0


@pytest.mark.parametrize(
    ("driver", "held"),
    [
        (DriverDouble([]), 0),
        (DriverDouble([False, False]), 0),
        (DriverDouble([False, True, True]), 2),
        (DriverDouble([True], initialised=False), 0),
    ],
)
def test_contexts_are_counted_as_the_driver_tells_them(driver: Any, held: int) -> None:
    assert held_contexts(driver) == held


def test_imports_draw_no_random_numbers() -> None:
    import torch

    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    assert warm_up().gpu_contexts == 0
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


IMPORTED_LATER = """
import sys
from engine.guards import before_transformers
before_transformers()
import engine.commands
from engine.warming import warm_up
warm_up()
before = set(sys.modules)
import engine.generation, engine.training, engine.outline, engine.transformers_backend
print("torch._inductor.codecache" in sys.modules)
print(sorted(set(sys.modules) - before))
"""


@pytest.mark.engine
def test_what_loads_and_runs_need_is_not_imported_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_LATER], cwd=BACKEND, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.splitlines()[-2:] == ["False", "[]"], done.stderr  # nor is torch's compiler


def test_what_bitsandbytes_has_compiled_is_compiled_when_it_is_called() -> None:
    """In a process of its own, since this one may have imported it."""
    program = """
import torch
from engine.guards import import_bitsandbytes
asked = []
def compile(function, **options):
    asked.append((function.__name__, options))
    return function
torch.compile = compile
import_bitsandbytes()
assert torch.compile is compile and not asked, asked
from bitsandbytes.backends.default import ops
values = torch.tensor([0, 255], dtype=torch.uint8)
for _ in range(2):
    read = ops._dequantize_blockwise_compute(values, torch.ones(1), torch.arange(256.0), 2, torch.float32)
print(read.tolist(), asked)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=BACKEND, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["[0.0, 255.0] [('_dequantize_blockwise_compute', {'dynamic': False})]"], (
        done.stderr
    )
