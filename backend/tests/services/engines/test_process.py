"""The handle on an engine: its answers, its log, its death."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from core import allocator
from core.errors import EngineFailed
from core.settings import get_settings
from domain import protocol
from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.results import Loaded, MemoryHeld
from services.engines.process import CommandFailed, EngineDied, EngineProcess
from tests.core.test_environment import SECRETS
from tests.support.cpu_cgroup import starved
from tests.support.server import BACKEND, wait_until

pytestmark = pytest.mark.engine
CONFIG = configure(
    Algorithm.LORA, use_case=None, overrides={}, machine=MachineFacts(has_gpu=False, supports_bf16=False)
).config


def _load(path: Path) -> protocol.LoadBase:
    return protocol.LoadBase(model_path=str(path), config=CONFIG, device="cpu", engine="transformers")


def test_a_failed_command_leaves_the_engine_alive_and_says_why(tmp_path: Path, tiny_path: Path) -> None:
    engine = EngineProcess(tmp_path / "engine.log")
    try:
        with pytest.raises(CommandFailed) as caught:
            engine.request(_load(tmp_path / "nothing")).result(600)
        assert caught.value.extras["error_class"] == "bad_model"
        loaded = engine.request(_load(tiny_path)).result(600)
        assert isinstance(loaded, Loaded) and loaded.total_parameters > 0 and engine.alive
    finally:
        engine.close()
    assert not psutil.pid_exists(engine.pid)


def test_kill_9_fails_what_is_pending_with_the_signal(tmp_path: Path, tiny_path: Path) -> None:
    ended: list[bool] = []
    engine = EngineProcess(tmp_path / "engine.log", on_exit=lambda: ended.append(True))
    future = engine.request(_load(tiny_path))
    assert engine.has_pending
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDied) as caught:
        future.result(600)
    assert caught.value.extras["signal"] == 9 and not engine.has_pending
    with pytest.raises(EngineDied):
        engine.request(_load(tiny_path)).result(600)
    wait_until(lambda: ended == [True])
    engine.close()


def _double(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> EngineProcess:
    """Start a double that reads one command and runs `answer`, which knows its `request` id and `events`."""
    package = folder / "double" / "engine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, json, sys\n"
        "commands = os.fdopen(int(os.environ['PEFT_STUDIO_ENGINE_COMMAND_FD']))\n"
        "events = os.fdopen(int(os.environ['PEFT_STUDIO_ENGINE_EVENT_FD']), 'w')\n"
        "request = json.loads(commands.readline())['request_id']\n"
        "def done(result):\n"
        "    events.write(json.dumps({'kind': 'done', 'request_id': request, 'result': result}) + '\\n')\n"
        f"{answer}"
        "events.flush()\n"
        "commands.readline()\n"
    )
    monkeypatch.setattr("services.engines.spawning._BACKEND", package.parent)
    return EngineProcess(folder / "engine.log")


@pytest.mark.parametrize("blocks", [1, pytest.param(128, marks=pytest.mark.slow)])
def test_a_chatty_engine_neither_blocks_nor_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """A double that prints 8 MB, or 1 GB, and garbage on the event pipe before it answers."""
    engine = _double(
        tmp_path,
        monkeypatch,
        f"for _ in range({blocks}): print('x' * 8_000_000)\n"
        "for _ in range(40_000): print('y' * 99, file=sys.stderr)\n"
        'events.write(\'not json\\n{"kind": "unknown"}\\n\')\n'
        "done({'memory_bytes': 1})\n",
    )
    try:
        held = engine.request(protocol.DetachAdapter(adapter_id="a")).result(30 * blocks)
        assert held == MemoryHeld(memory_bytes=1)
    finally:
        engine.close()
    assert engine.garbage_lines == 2
    written = sum(file.stat().st_size for file in tmp_path.glob("engine.log*"))
    assert written <= 9 * 2**20


def test_what_is_not_the_commands_result_fails_the_command_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "json.dumps({'kind': 'token', 'request_id': request, 'text': 'of another command'})"
    engine = _double(tmp_path, monkeypatch, f"events.write({token} + '\\n')\ndone({{'text': 'of another command'}})\n")
    told: list[protocol.Progress] = []
    try:
        command = protocol.PrepareGguf(gguf_path="a", output_path="b", model_id="c")
        with pytest.raises(EngineFailed, match="PrepareGguf"):
            engine.request(command, told.append).result(600)
        assert engine.alive and not engine.has_pending
        assert not told and engine.garbage_lines == 1
    finally:
        engine.close()


def test_an_engine_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from services.engines.process import EngineProcess\n"
        f"print(EngineProcess(Path({str(tmp_path / 'engine.log')!r})).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=BACKEND, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    wait_until(lambda: not psutil.pid_exists(pid))


def test_an_engine_is_not_taken_for_dead_while_its_events_wait_for_the_database(
    tmp_path: Path, tiny_path: Path
) -> None:
    """The thread that hears an engine also writes its events: while it writes, silence is no sign of death."""
    engine = EngineProcess(tmp_path / "engine.log")
    try:
        engine.request(_load(tiny_path)).result(600)
        heard: list[float] = []

        def slow(_token: protocol.Token) -> None:
            if not heard:
                before_s = engine._heard_s
                wait_until(lambda: engine._heard_s > before_s)  # as long as the database takes
                heard.append(engine._heard_s)

        command = protocol.Generate(
            messages=None, prompt="the", adapter_id=None, max_new_tokens=4, temperature=0.0,
            top_p=1.0, seed=0, stop=[],
        )  # fmt: skip
        engine.request(command, slow).result(600)
        assert heard and engine.alive
    finally:
        engine.close()


def test_an_engine_that_gets_no_processor_is_not_taken_for_dead(tmp_path: Path, tiny_path: Path) -> None:
    engine = EngineProcess(tmp_path / "engine.log")
    try:
        engine.request(_load(tiny_path)).result()
        command = protocol.Generate(
            messages=None, prompt="the", adapter_id=None, max_new_tokens=200, temperature=0.0,
            top_p=1.0, seed=0, stop=[],
        )  # fmt: skip
        answer = engine.request(command)
        with starved(engine.pid):
            engine._silence_s = 4.0
            time.sleep(5 * engine._silence_s)  # the fault itself
            assert engine.alive
            engine._silence_s = 60.0
        heard_s = engine._heard_s
        wait_until(lambda: engine._heard_s > heard_s)
        engine.stop(command.request_id)
        answer.result()
    finally:
        engine.close()


def test_an_engine_that_rests_is_silent_and_is_not_taken_for_dead(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "engine.log")
    try:
        assert engine.request(protocol.WarmUp()).result(600).gpu_contexts == 0
        engine._silence_s = 0.1
        before_s = engine._heard_s
        time.sleep(3 * protocol.HEARTBEAT_S)  # nothing happens that could be waited for
        assert engine.alive and engine._heard_s >= before_s
        engine._silence_s = 60.0
        with pytest.raises(CommandFailed):
            engine.request(protocol.DetachAdapter(adapter_id="a")).result(600)
        heard_s = engine._heard_s
        wait_until(lambda: engine._heard_s > heard_s)  # its heartbeats have begun again
    finally:
        engine.close()


def test_an_engine_that_is_taken_over_writes_and_ends_for_its_new_owner(tmp_path: Path) -> None:
    ended: list[str] = []
    engine = EngineProcess(tmp_path / "before.log", on_exit=lambda: ended.append("before"), in_background=True)
    try:
        (tmp_path / "after.log").write_text("from another\n")
        with pytest.raises(CommandFailed):
            engine.request(_load(Path("nothing"))).result(600)
        adjustment = Path(f"/proc/{engine.pid}/oom_score_adj")
        assert int(adjustment.read_text()) == 1000  # the first that the kernel ends where memory runs out
        assert engine.take_over(tmp_path / "after.log", lambda: ended.append("after"), 60.0)
        assert not (tmp_path / "before.log").exists()
        assert (tmp_path / "after.log").read_text().startswith("from another\n")
        assert int(adjustment.read_text()) == 300 + int(Path("/proc/self/oom_score_adj").read_text())
        usual = min(19, psutil.Process().nice() + get_settings().engine_nice)
        assert {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process(engine.pid).threads()} == {
            usual
        }
        os.kill(engine.pid, signal.SIGKILL)
        wait_until(lambda: bool(ended))
        assert ended == ["after"]
        assert not engine.take_over(tmp_path / "late.log", None, 60.0)
    finally:
        engine.close()


def test_an_engine_is_shown_its_one_gpu_by_uuid(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "engine.log", gpu_uuid="GPU-1234")
    try:
        environment = psutil.Process(engine.pid).environ()
        assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1234"
        assert environment["UNSLOTH_COMPILE_LOCATION"].startswith(str(tmp_path))
    finally:
        engine.close()


def test_an_engine_that_holds_no_model_is_shown_no_gpu(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "engine.log", backend="none")
    try:
        assert psutil.Process(engine.pid).environ()["CUDA_VISIBLE_DEVICES"] == ""
    finally:
        engine.close()


def test_an_engine_is_given_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "canary")
    engine = EngineProcess(tmp_path / "engine.log")
    try:
        assert "canary" not in psutil.Process(engine.pid).environ().values()
    finally:
        engine.close()


def _libraries(engine: EngineProcess) -> set[str]:
    """Names of what an engine that has answered has mapped."""
    with pytest.raises(CommandFailed):
        engine.request(_load(Path("nothing"))).result(600)
    return {Path(mapped.path).name for mapped in psutil.Process(engine.pid).memory_maps()}


@pytest.mark.skipif(allocator.preload() is None, reason="tcmalloc is not installed here")
def test_an_engine_on_the_cpu_has_tcmalloc_and_one_on_a_gpu_has_not(tmp_path: Path) -> None:
    for folder, gpu_uuid in (("a", None), ("b", "GPU-1234")):
        engine = EngineProcess(tmp_path / folder / "engine.log", gpu_uuid=gpu_uuid)
        try:
            assert any("tcmalloc" in name for name in _libraries(engine)) == (gpu_uuid is None)
        finally:
            engine.close()


def test_unsloth_is_imported_before_what_it_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    engine = EngineProcess(tmp_path / "engine.log", backend="unsloth")
    try:
        with pytest.raises(CommandFailed):  # the answer comes once everything is imported
            engine.request(_load(tmp_path / "nothing")).result(600)
        said = "\n".join(engine.log_tail())
        assert "Unsloth: Will patch" in said
        assert "should be imported before" not in said  # its warning that something was imported too early
    finally:
        engine.close()


AS_ANOTHER_USER = """
import os
from services.engines.priority import can_be_raised
os.setuid(65534)
before = os.getpriority(os.PRIO_PROCESS, 0)
print(can_be_raised(3), os.getpriority(os.PRIO_PROCESS, 0) == before)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_who_may_not_raise_a_priority_is_known_before_one_is_lowered() -> None:
    done = subprocess.run([sys.executable, "-c", AS_ANOTHER_USER], cwd=BACKEND, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
