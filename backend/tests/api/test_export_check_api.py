"""An export says succeeded once it has been checked: faults are put into a real server's exports on their way."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.api.test_exports_api import EMBEDDED_ID, export, finished, state_of, train
from tests.support.adapter_double import adapter_files, adapter_tensors, write_files
from tests.support.hub_double import safetensors_bytes
from tests.support.seeded_faults import environment
from tests.support.server import StudioServer, start_server, wait_until

pytestmark = pytest.mark.engine
TENSOR = "model.layers.1.self_attn.q_proj.weight"


class Bench:
    """A server whose exports go wrong as a file says."""

    def __init__(self, studio: StudioServer, fault: Path, adapter_id: str) -> None:
        self.studio, self._fault, self.adapter_id = studio, fault, adapter_id

    def goes_wrong(self, fault: str) -> None:
        self._fault.write_text(fault)

    def held_up(self) -> tuple[str, psutil.Process]:
        """Return an export that is being checked, and the engine that checks it, until the fault is taken back."""
        self.goes_wrong("wait")
        before = {process.pid for process in self.studio.engines()}
        export_id = export(self.studio, self.adapter_id)["id"]
        wait_until(lambda: _stage(state_of(self.studio, export_id)) == "checking")
        # The base's engine may be new as well: the one that checks is the last.
        wait_until(lambda: [process for process in self.studio.engines() if process.pid not in before])
        newest = max(self.studio.engines(), key=lambda process: process.create_time())
        return str(export_id), newest

    @property
    def folder(self) -> Path:
        return self.studio.home / "exports"


def _stage(shown: dict[str, Any]) -> str | None:
    return shown["progress"]["stage"] if shown["progress"] is not None else None


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("seeded")
    with start_server(folder / "home", model_dirs, **environment(folder / "fault")) as studio:
        adapter_id = train(studio)
        bench = Bench(studio, folder / "fault", adapter_id)
        finished(studio, export(studio, adapter_id)["id"])  # the base is loaded from here on
        yield bench


def test_an_export_that_succeeded_says_how_it_was_checked(bench: Bench) -> None:
    bench.goes_wrong("")
    for body, tensors in (({}, 21), ({"format": "gguf", "quantization": "q8_0"}, 21)):
        done = finished(bench.studio, export(bench.studio, bench.adapter_id, **body)["id"])
        assert done["state"] == "succeeded", done["error"]
        check = done["result"]["check"]
        assert (check["tensors"], check["prompts"], check["notes"]) == (tensors, 5, [])
        assert 0 <= check["difference"] <= check["tolerance"] and check["elapsed_s"] > 0


@pytest.mark.parametrize("fault", ["lose", "change"])
def test_a_wrong_export_fails_and_its_files_are_kept_aside(bench: Bench, fault: str) -> None:
    bench.goes_wrong(f"{fault} {TENSOR}")
    done = finished(bench.studio, export(bench.studio, bench.adapter_id)["id"])
    assert (done["state"], done["error"]["class"]) == ("failed", "export_differs"), done
    kept = bench.folder / f"{done['id']}-not-checked"
    assert TENSOR in done["error"]["message"] and str(kept) in done["error"]["message"]
    assert done["error"]["suggestions"] and done["result"] is None
    assert (done["files"], done["path"]) == ([], None)
    assert (kept / "model.safetensors").is_file() and not (bench.folder / done["id"]).exists()
    assert bench.studio.http.get(f"/api/exports/{done['id']}/download").status_code == 404
    assert bench.studio.http.delete(f"/api/exports/{done['id']}").status_code == 204
    assert not kept.exists()


def test_a_check_that_is_killed_fails_the_export_and_keeps_its_files(bench: Bench) -> None:
    export_id, engine = bench.held_up()
    engine.send_signal(signal.SIGKILL)
    done = finished(bench.studio, export_id)
    assert (done["state"], done["error"]["class"], done["error"]["signal"]) == ("failed", "engine_killed", 9), done
    assert (bench.folder / f"{export_id}-not-checked/model.safetensors").is_file()
    bench.goes_wrong("")
    again = finished(bench.studio, export(bench.studio, bench.adapter_id)["id"])
    assert again["state"] == "succeeded", again["error"]


def test_an_export_is_cancelled_in_the_middle_of_its_check(bench: Bench) -> None:
    export_id, engine = bench.held_up()
    assert bench.studio.http.post(f"/api/exports/{export_id}/cancel").status_code == 202
    assert finished(bench.studio, export_id)["state"] == "cancelled"
    assert not psutil.pid_exists(engine.pid)
    wait_until(lambda: not list(bench.folder.glob(f"*{export_id}*")))  # its files go once it is cancelled


def test_a_base_is_free_for_others_while_an_export_is_checked(bench: Bench) -> None:
    export_id, _ = bench.held_up()
    adapter_id = train(bench.studio)  # on the same base
    assert state_of(bench.studio, export_id)["state"] == "running"
    bench.goes_wrong("")
    assert finished(bench.studio, export_id)["state"] == "succeeded"
    assert bench.studio.http.delete(f"/api/adapters/{adapter_id}").status_code == 204


def test_a_server_killed_in_the_middle_of_a_check_starts_the_export_again(bench: Bench) -> None:
    export_id, engine = bench.held_up()
    bench.studio.kill()
    wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    bench.goes_wrong("")
    bench.studio.start()
    done = finished(bench.studio, export_id)
    assert (done["state"], done["attempts"]) == ("succeeded", 2), done
    assert [path.name for path in bench.folder.glob(f"*{export_id}*")] == [export_id]


def test_the_embedded_model_passes_its_check(bench: Bench) -> None:
    files = adapter_files(base_model_name_or_path=EMBEDDED_ID, target_modules=["q_proj"])
    files["adapter_model.safetensors"] = safetensors_bytes(adapter_tensors(30, {"q_proj": (576, 576)}))
    source = write_files(bench.studio.home / "inbox", files)
    bench.goes_wrong("")
    adapter_id = bench.studio.http.post("/api/adapters", json={"path": str(source)}).json()["id"]
    done = finished(bench.studio, export(bench.studio, adapter_id)["id"])
    assert done["state"] == "succeeded", done["error"]
    assert (done["result"]["check"]["tensors"], done["result"]["dtype"]) == (272, "bfloat16")
