"""Engines that are kept ready, through a real server: taken by loads, replaced, idle, and never left behind."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
GIB = 2**30
LIMIT_S = 240.0  # for imports on a machine that does other things
IDLE_S = 5.0  # longer than two heartbeats
OVERRIDES = {"rank": 4, "alpha": 8, "max_seq_length": 64, "epochs": 1.0, "target_modules": ["q_proj"], "seed": 3}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    """A server that keeps engines ready."""
    with _server(tmp_path_factory.mktemp("warm"), model_dirs) as server:
        yield server


def _server(home: Path, model_dirs: Path) -> StudioServer:
    # With a cache of its own no model's shape is known beforehand.
    own = {"PEFT_STUDIO_WARM_ENGINE_BYTES": str(2 * GIB), "PEFT_STUDIO_CACHE_DIR": str(home / "cache")}
    return start_server(home, model_dirs, **own)


def _kept(studio: StudioServer) -> dict[str, dict[str, Any]]:
    """Return those that are kept, by the library that each is for."""
    return {one["engine"]: one for one in studio.http.get("/api/hardware/usage").json()["warm_engines"]}


def _ready(studio: StudioServer, *names: str) -> dict[str, int]:
    """Wait until those are ready; return their process ids."""
    wait_until(lambda: all(_kept(studio).get(name, {}).get("state") == "ready" for name in names), LIMIT_S)
    return {name: one["pid"] for name, one in _kept(studio).items()}


def _work_done(pid: int) -> tuple[float, int]:
    """Return the processor time of a process, and how often its threads have been given a processor."""
    process = psutil.Process(pid)
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    switches = [line for status in statuses for line in status.splitlines() if "ctxt_switches" in line]
    return sum(process.cpu_times()[:2]), sum(int(line.split()[1]) for line in switches)


def test_a_load_takes_the_engine_that_is_ready_and_another_is_started(warm: StudioServer) -> None:
    before = _ready(warm, "transformers", "none")
    loaded = warm.load(TINY_ID, overrides=OVERRIDES)
    assert loaded["engine_pid"] == before["transformers"]
    assert warm.generate(loaded["id"], "hello")["completion_tokens"] > 0
    # The engine that read the model's shape was there too, and is not replaced while it lives.
    assert "none" not in _kept(warm) and psutil.Process(before["none"]).cmdline()[-1] == "none"
    after = _ready(warm, "transformers")
    assert after["transformers"] != before["transformers"]
    assert psutil.Process(loaded["engine_pid"]).nice() < 19  # it gives way to everything else no longer
    logs = {path.name for path in (warm.home / "logs").glob("engine-*.log")}
    assert len(logs - {"engine-warm-transformers.log"}) == 1  # what it wrote before is in the load's log


def test_what_they_hold_is_told_and_is_none_of_the_gpus(warm: StudioServer) -> None:
    _ready(warm, "transformers")
    kept = warm.http.get("/api/hardware/profile").json()["warm_engines"]
    assert all(one["gpu_uuid"] is None and 50 * 2**20 < one["memory_bytes"] < GIB for one in kept)
    shown = next(
        line
        for line in warm.http.get("/metrics").text.splitlines()
        if line.startswith("peft_studio_warm_engine_memory")
    )
    assert float(shown.split()[1]) > 50 * 2**20


def test_when_memory_runs_out_the_kernel_ends_ready_ones_first_and_the_server_last(warm: StudioServer) -> None:
    loaded = warm.load(TINY_ID, overrides=OVERRIDES | {"target_modules": ["k_proj"]})
    ready = _ready(warm, "transformers")["transformers"]
    # What the kernel compares when it looks for the process to end: the highest goes first.
    verdicts = [int(Path(f"/proc/{pid}/oom_score").read_text()) for pid in (ready, loaded["engine_pid"], warm.pid)]
    assert verdicts == sorted(set(verdicts), reverse=True), verdicts


def test_one_that_is_ready_does_nothing_at_all(warm: StudioServer) -> None:
    pid = _ready(warm, "transformers")["transformers"]

    def rests() -> bool:
        before = _work_done(pid)
        time.sleep(IDLE_S)  # nothing happens that could be waited for
        return _work_done(pid) == before

    wait_until(rests, LIMIT_S)


def test_one_that_was_killed_is_replaced_and_nothing_fails_meanwhile(warm: StudioServer) -> None:
    pid = _ready(warm, "transformers")["transformers"]
    os.kill(pid, signal.SIGKILL)
    loaded = warm.load(TINY_ID, overrides=OVERRIDES | {"precision": "bf16"})
    assert loaded["state"] == "ready" and loaded["engine_pid"] != pid
    assert _ready(warm, "transformers")["transformers"] not in (pid, loaded["engine_pid"])


def test_one_that_is_stopped_by_a_signal_is_not_given_to_a_load(warm: StudioServer) -> None:
    pid = _ready(warm, "transformers")["transformers"]
    os.kill(pid, signal.SIGSTOP)
    loaded = warm.load(TINY_ID, overrides=OVERRIDES | {"quantization": "nf4"})
    assert loaded["state"] == "ready" and loaded["engine_pid"] != pid and not psutil.pid_exists(pid)


def test_a_job_on_a_taken_engine_is_equal_to_the_bit(warm: StudioServer, studio: StudioServer) -> None:
    """On an engine that was ready, and on one that was started for the job."""
    weights = []
    for server in (warm, studio):
        if server is warm:
            _ready(warm, "transformers")
        dataset = server.upload(messages_jsonl(), name="rows")
        body = {"model_id": TINY_ID, "dataset_id": dataset["id"], "algorithm": "pissa"}
        job = server.submit(**body, overrides=OVERRIDES | {"dropout": 0.1, "precision": "fp32", "rank": 2})
        done = server.wait_for_state(job["id"], "succeeded", "failed")
        assert done["state"] == "succeeded", done
        weights.append(server.adapter_weights(done["adapter_id"]))
    assert "engine.taken" in warm.log_path.read_text() and "engine.taken" not in studio.log_path.read_text()
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("state", "how"), [("starting", "SIGTERM"), ("ready", "SIGKILL")])
def test_none_is_left_behind_when_the_server_ends(tmp_path: Path, model_dirs: Path, how: str, state: str) -> None:
    with _server(tmp_path / "home", model_dirs) as studio:
        wait_until(lambda: _kept(studio).get("transformers", {}).get("state") == state, LIMIT_S)
        pids = [child.pid for child in psutil.Process(studio.pid).children() if "engine" in child.cmdline()]
        assert pids
        assert studio.process is not None
        studio.process.send_signal(getattr(signal, how))
        studio.process.wait(600)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_the_setting_keeps_none(studio: StudioServer) -> None:
    """The tests' own servers are set so."""
    assert studio.load(TINY_ID, overrides=OVERRIDES)["state"] == "ready"
    assert _kept(studio) == {} and "engine.warm" not in studio.log_path.read_text()
