"""What an engine's heap keeps of what was freed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.engines.spawning import ENGINE_ENVIRONMENT

BACKEND = Path(__file__).resolve().parents[2]
BLOCK, BLOCKS = 24 * 2**20, 8
SCRIPT = f"""
import json, psutil, torch
from engine.heap import passing

def left():
    before = psutil.Process().memory_info().rss
    blocks = [torch.ones({BLOCK} // 4) for _ in range({BLOCKS})]
    after = torch.ones(1024)  # the heap's end cannot move back before it
    del blocks
    return psutil.Process().memory_info().rss - before

torch.ones(2**20).add_(1)  # starts torch's threads
with passing():
    left_loading = left()
print(json.dumps([left_loading, left()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_large_blocks_freed_while_loading_are_the_systems_and_later_ones_are_kept() -> None:
    environment = {**os.environ, **ENGINE_ENVIRONMENT, "LD_PRELOAD": ""}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=BACKEND, env=environment, capture_output=True, text=True, check=True
    )
    loading, later = json.loads(run.stdout)
    assert loading < BLOCKS * BLOCK / 2  # what the heap had free at its end was used first
    assert later > BLOCKS * BLOCK / 2  # and so here
