"""What engines hold, measured from outside their processes: one base however many adapters, and nothing afterwards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from memory_points import peak_bytes

from tests.support.random_adapter import make_random_adapter
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID, make_tiny_model

pytestmark = pytest.mark.engine
MEDIUM_ID = "tests/medium-llama"
MEDIUM = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
ADAPTERS, RANK = 8, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 52 million parameters, large beside what torch itself takes to load one, and the tiny one."""
    root = tmp_path_factory.mktemp("models")
    make_tiny_model(root / MEDIUM_ID, **MEDIUM)
    make_tiny_model(root / TINY_ID)
    return root


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[StudioServer]:
    with start_server(tmp_path_factory.mktemp("home"), models) as server:
        yield server


def _base_bytes(models: Path) -> int:
    return (models / MEDIUM_ID / "model.safetensors").stat().st_size


def _resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def _engine_starts(studio: StudioServer) -> float:
    line = next(
        line
        for line in studio.http.get("/metrics").text.splitlines()
        if line.startswith("peft_studio_engine_starts_total")
    )
    return float(line.split()[-1])


def test_one_base_with_eight_adapters_is_one_base_and_eight_adapters(studio: StudioServer, models: Path) -> None:
    inbox = studio.home / "inbox"
    sizes, ids = [], []
    for number in range(ADAPTERS):
        folder = inbox / f"adapter-{number}"
        sizes.append(make_random_adapter(models / MEDIUM_ID, folder, MEDIUM_ID, RANK, number))
        response = studio.http.post("/api/adapters", json={"path": str(folder)})
        assert response.status_code == 201, response.text
        ids.append(response.json()["id"])
    loaded = studio.load(MEDIUM_ID)
    pid = loaded["engine_pid"]
    resident = []
    answers = set()
    for adapter_id in ids:
        answers.add(studio.generate(loaded["id"], "the quick", adapter_id, max_new_tokens=8)["text"])
        resident.append(_resident(pid))
    found = studio.http.get(f"/api/peft/loaded-models/{loaded['id']}").json()
    assert found["adapters"] == ids and [engine.pid for engine in studio.engines()] == [pid]
    assert len(answers) > 1  # they do differ
    # Seven more adapters cost seven adapters, with as much again for the modules that hold them and the allocator.
    assert resident[-1] - resident[0] < 2 * sum(sizes[1:])
    assert resident[-1] - resident[0] < _base_bytes(models) / 2
    assert studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}").status_code == 204


def _train_twice(studio: StudioServer, model_id: str) -> int:
    """Train on a loaded base, by its id and by the model's; return the bytes by which its engine grew."""
    loaded = studio.load(model_id)
    studio.generate(loaded["id"], "the quick", max_new_tokens=2)  # the file's pages come in when they are first used
    pid, starts, before = loaded["engine_pid"], _engine_starts(studio), _resident(loaded["engine_pid"])
    row = {"prompt": "the quick", "completion": "brown fox"}
    dataset = studio.upload("\n".join([json.dumps(row)] * 4))
    for body in ({"loaded_model_id": loaded["id"]}, {"model_id": model_id}):
        settings = {"max_steps": 2, "batch_size": 1, "gradient_accumulation": 1, "rank": 2, "max_seq_length": 32}
        job = studio.submit(**body, dataset_id=dataset["id"], overrides=settings)
        studio.events(job["id"])
        assert studio.job(job["id"])["state"] == "succeeded"
    assert _engine_starts(studio) == starts and [engine.pid for engine in studio.engines()] == [pid]
    grown = _resident(pid) - before
    unload_everything(studio)
    return grown


def test_a_job_on_a_loaded_base_does_not_load_it_again(studio: StudioServer, models: Path) -> None:
    torch_itself = _train_twice(studio, TINY_ID)  # what a first run costs where the weights are next to nothing
    assert _train_twice(studio, MEDIUM_ID) - torch_itself < _base_bytes(models) / 2


@pytest.mark.parametrize("stopped", [False, True])
def test_what_a_run_has_freed_the_system_has_back(studio: StudioServer, stopped: bool) -> None:
    loaded = studio.load(MEDIUM_ID)
    studio.generate(loaded["id"], "the quick", max_new_tokens=2)
    pid, before = loaded["engine_pid"], _resident(loaded["engine_pid"])
    row = {"prompt": "the quick " * 200, "completion": "brown fox " * 200}
    dataset = studio.upload("\n".join([json.dumps(row)] * 8))
    settings = {"max_steps": 100_000 if stopped else 2, "batch_size": 8, "max_seq_length": 256, "train_on": "all"}
    job = studio.submit(loaded_model_id=loaded["id"], dataset_id=dataset["id"], overrides=settings)
    studio.wait_for_step(job["id"], 2)
    if stopped:
        studio.http.post(f"/api/training/jobs/{job['id']}/cancel")
    studio.events(job["id"])
    took = peak_bytes(pid) - before
    assert took > 400 * 2**20  # there was something to give back
    wait_until(lambda: _resident(pid) - before < 0.5 * took)
    unload_everything(studio)


def unload_everything(studio: StudioServer) -> None:
    for model in studio.http.get("/api/peft/loaded-models").json()["models"]:
        assert studio.http.delete(f"/api/peft/loaded-models/{model['id']}").status_code == 204
    assert studio.engines() == []


def test_unloading_ends_one_engine_and_touches_no_other(studio: StudioServer) -> None:
    gone, stays = studio.load(MEDIUM_ID), studio.load(TINY_ID)
    before = studio.generate(stays["id"], "the quick")["text"]
    process = psutil.Process(gone["engine_pid"])
    started = psutil.Process(stays["engine_pid"]).create_time()
    assert studio.http.delete(f"/api/peft/loaded-models/{gone['id']}").status_code == 204
    assert not process.is_running()  # when the answer came, not some time later
    assert [engine.pid for engine in studio.engines()] == [stays["engine_pid"]]
    assert psutil.Process(stays["engine_pid"]).create_time() == started
    assert studio.generate(stays["id"], "the quick")["text"] == before
    unload_everything(studio)


def test_an_idle_model_is_unloaded_and_a_working_one_is_not(tmp_path: Path, models: Path) -> None:
    idle_s = 1.0
    with start_server(tmp_path, models, PEFT_STUDIO_IDLE_UNLOAD_S=str(idle_s)) as studio:
        row = {"prompt": "the quick", "completion": "brown fox"}
        dataset = studio.upload("\n".join([json.dumps(row)] * 4))
        job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides={"max_steps": 100_000})
        studio.wait_for_step(job["id"], 1)
        pid = studio.engine().pid

        def trained_s() -> Any:
            rows = studio.http.get(f"/api/training/jobs/{job['id']}/metrics").json()["metrics"]
            return rows[-1]["elapsed_s"]

        wait_until(lambda: trained_s() > 4 * idle_s)
        assert [engine.pid for engine in studio.engines()] == [pid]
        studio.http.post(f"/api/training/jobs/{job['id']}/cancel")
        studio.events(job["id"])
        wait_until(lambda: not psutil.pid_exists(pid))
        assert studio.http.get("/api/peft/loaded-models").json()["models"] == []
