"""The kernel kills an engine for want of memory: really, in a cgroup that is too small."""

import json
from pathlib import Path

import pytest

from tests.support.memory_cgroup import memory_cgroup
from tests.support.server import start_server
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
_ROOM_BYTES = 16 * 2**20
# 256 rows of 256 tokens: some 400 MiB of activations, which is more than the pages of files that could make room.
_ROWS = 256
OVERRIDES = {"rank": 8, "batch_size": _ROWS, "max_seq_length": 256, "max_steps": 50, "gradient_checkpointing": False}


def long_rows(count: int) -> str:
    turns = [{"role": "user", "content": "say much"}, {"role": "assistant", "content": "0123456789 " * 60}]
    return (json.dumps({"messages": turns}) + "\n") * count


def test_a_job_that_the_kernel_kills_for_memory_says_so_and_is_not_tried_again(
    tmp_path: Path, model_dirs: Path
) -> None:
    with memory_cgroup() as group:
        # As in a container: the limit is around the server and its engines. None is kept ready, since that one would be
        # killed in the job's place.
        with group.around():
            studio = start_server(tmp_path / "home", model_dirs, PEFT_STUDIO_WARM_ENGINE_BYTES="0").start()
        with studio:
            model = studio.load(TINY_ID)
            dataset = studio.upload(long_rows(_ROWS))
            engine = studio.engine()
            group.limit(group.used_bytes() + _ROOM_BYTES)
            job = studio.submit(loaded_model_id=model["id"], dataset_id=dataset["id"], overrides=OVERRIDES, force=True)
            job = studio.wait_for_state(job["id"], "failed", "succeeded", "paused")
            assert studio.process is not None and studio.process.poll() is None
    assert job["state"] == "failed" and job["attempts"] == 1, job
    assert (job["error"]["class"], job["error"]["signal"]) == ("out_of_host_memory", 9), job["error"]
    assert any("batch_size" in suggestion for suggestion in job["error"]["suggestions"]), job["error"]
    assert not engine.is_running()
