"""Loading models from the Hub through a real server, the Hub being a double."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_double import HubDouble, safetensors_bytes
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server, wait_until

pytestmark = pytest.mark.engine
SMALL = safetensors_bytes({"w": ("BF16", (64,))})
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


def hub_environment(hub: HubDouble, home: Path) -> dict[str, str]:
    """Point a server at the double, with caches of its own: another run's double may have had the same port."""
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": "",
        "PEFT_STUDIO_CACHE_DIR": str(home / "cache"),
    }


@pytest.fixture(scope="module")
def tiny_files(tiny_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny_path.iterdir()}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubDouble]:
    with HubDouble() as double:
        yield double


@pytest.fixture(scope="module")
def studio(hub: HubDouble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    home = tmp_path_factory.mktemp("home")
    with start_server(home, home / "models", **hub_environment(hub, home)) as server:
        yield server


def start_load(studio: StudioServer, model_id: str, **body: Any) -> dict[str, Any]:
    response = studio.http.post("/api/peft/load-model", json={"model_id": model_id, **body})
    assert response.status_code in (200, 202), response.text
    return dict(response.json())


def loaded(studio: StudioServer, loaded_id: str) -> dict[str, Any]:
    return dict(studio.http.get(f"/api/peft/loaded-models/{loaded_id}").json())


def test_one_model_loaded_50_times_at_once_is_downloaded_and_loaded_once(
    studio: StudioServer, hub: HubDouble, tiny_files: dict[str, bytes]
) -> None:
    hub.add_model("me/popular", tiny_files)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: start_load(studio, "me/popular", wait_s=120), range(50)))

    assert {answer["state"] for answer in answers} == {"ready"}
    assert len({answer["engine_pid"] for answer in answers}) == 1
    assert len(studio.engines()) == 1
    assert hub.requests["cdn"] == 1
    (answer,) = {json.dumps(answer, sort_keys=True) for answer in answers}
    progress = json.loads(answer)["progress"]
    assert progress["downloaded_bytes"] == progress["total_bytes"] or progress["total_bytes"] is None
    studio.http.delete(f"/api/peft/loaded-models/{json.loads(answer)['id']}")


def test_a_server_killed_during_a_download_resumes_it(
    hub: HubDouble, tiny_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add_model("me/killed", tiny_files)
    half = len(tiny_files["model.safetensors"]) // 2
    server = start_server(tmp_path, tmp_path / "models", **hub_environment(hub, tmp_path)).start()
    try:
        hub.fail("cdn", "stall")
        model = start_load(server, "me/killed")
        assert hub.stalled.wait(600)
        wait_until(lambda: any(path.stat().st_size == half for path in tmp_path.rglob("*.incomplete")))
        wait_until(lambda: (loaded(server, model["id"])["progress"]["downloaded_bytes"] or 0) >= half)
        progress = loaded(server, model["id"])
        server.kill()
        before = len(hub.seen)
        server.start()
        assert server.load("me/killed")["state"] == "ready"
    finally:
        server.stop()

    assert progress["state"] == "downloading"
    assert half <= progress["progress"]["downloaded_bytes"] < progress["progress"]["total_bytes"]
    fetched = [seen for seen in hub.seen[before:] if seen.route == "cdn"]
    assert [seen.headers.get("Range") for seen in fetched] == [f"bytes={half}-"]


def test_cancelled_downloads_hold_nobody_up(studio: StudioServer, hub: HubDouble, tiny_files: dict[str, bytes]) -> None:
    for name in ("me/slow-1", "me/slow-2", "me/quick"):
        hub.add_model(name, tiny_files | {"name.json": json.dumps(name).encode()})
    hub.fail("cdn", "hang", times=2)
    before = hub.requests["cdn"]
    slow = [start_load(studio, name)["id"] for name in ("me/slow-1", "me/slow-2")]  # as many as there are loaders
    wait_until(lambda: hub.requests["cdn"] == before + 2)
    for loaded_id in slow:
        assert studio.http.delete(f"/api/peft/loaded-models/{loaded_id}").status_code == 204

    quick = studio.load("me/quick")
    assert quick["state"] == "ready"
    hub.release()
    studio.http.delete(f"/api/peft/loaded-models/{quick['id']}")


@pytest.mark.parametrize(
    ("files", "status", "slug"),
    [
        ({"config.json": {**CONFIG, "auto_map": {"AutoModel": "modeling.Evil"}}}, 409, "needs-remote-code"),
        ({"config.json": CONFIG, "tokenizer_config.json": {"auto_map": {"a": "b"}}}, 409, "needs-remote-code"),
        ({"config.json": {**CONFIG, "attn_implementation": "someone/kernel"}}, 409, "needs-remote-code"),
        ({"config.json": CONFIG, "model.safetensors": None, "pytorch_model.bin": "pickled"}, 409, "no-safe-weights"),
        ({"config.json": {**CONFIG, "num_hidden_layers": 10**7}}, 422, "model-rejected"),
        ({"config.json": [1]}, 422, "model-rejected"),
    ],
)
def test_what_may_not_be_loaded_is_refused_at_once(
    studio: StudioServer, hub: HubDouble, files: dict[str, Any], status: int, slug: str
) -> None:
    encoded = {name: json.dumps(value).encode() for name, value in files.items() if value is not None}
    if "pytorch_model.bin" not in files:
        encoded["model.safetensors"] = SMALL
    name = f"evil/{abs(hash(json.dumps(files)))}"
    hub.add_model(name, encoded)
    engines, cdn, spent_s = studio.engines(), hub.requests["cdn"], studio.processor_s()
    response = studio.http.post("/api/peft/load-model", json={"model_id": name, "force": True})

    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{slug}"), response.text
    assert studio.processor_s() - spent_s < 1
    assert studio.engines() == engines
    assert hub.requests["cdn"] == cdn


def test_a_tree_that_leaves_the_repository_fails_the_load(
    studio: StudioServer, hub: HubDouble, tiny_files: dict[str, bytes]
) -> None:
    hub.add_model("evil/paths", tiny_files)
    hub.lie_about_tree("evil/paths", {"type": "file", "path": "../../x", "oid": "0" * 40, "size": 1})
    model = start_load(studio, "evil/paths", wait_s=60)

    assert (model["state"], model["error"]["type"]) == ("failed", "model-rejected")
    assert not list(studio.home.rglob("models--evil--paths"))
    assert not list(studio.home.rglob("x"))


def test_weights_that_stay_corrupt_fail_the_load(
    studio: StudioServer, hub: HubDouble, tiny_files: dict[str, bytes]
) -> None:
    hub.add_model("me/corrupt", tiny_files)
    hub.fail("cdn", "flip", times=2)
    model = start_load(studio, "me/corrupt", wait_s=60)

    assert (model["state"], model["error"]["type"]) == ("failed", "download-corrupt")


def pickled(state: object) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_pickled_weights_are_converted_where_that_is_asked_for(
    studio: StudioServer, hub: HubDouble, tiny_files: dict[str, bytes], tiny_path: Path
) -> None:
    from safetensors.torch import load_file

    weights = load_file(tiny_path / "model.safetensors")
    files = {name: data for name, data in tiny_files.items() if name != "model.safetensors"}
    hub.add_model("me/pickled", files | {"pytorch_model.bin": pickled(weights)})
    refused = studio.http.post("/api/peft/load-model", json={"model_id": "me/pickled"})
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/no-safe-weights")
    assert "allow_pickle" in refused.json()["detail"]

    model = studio.load("me/pickled", allow_pickle=True)
    assert model["state"] == "ready"
    local = {item["model_id"]: item for item in studio.http.get("/api/models/local").json()["models"]}
    converted = load_file(Path(local["me/pickled"]["path"]) / "model.safetensors")
    assert all(bool((converted[name] == weights[name]).all()) for name in weights)
    studio.http.delete(f"/api/peft/loaded-models/{model['id']}")
    again = start_load(studio, "me/pickled")  # safetensors now, for everyone
    studio.http.delete(f"/api/peft/loaded-models/{again['id']}")


def test_a_job_whose_engine_dies_finds_its_pickled_model_again(
    studio: StudioServer, hub: HubDouble, tiny_files: dict[str, bytes], tiny_path: Path
) -> None:
    from safetensors.torch import load_file

    files = {name: data for name, data in tiny_files.items() if name != "model.safetensors"}
    weights = load_file(tiny_path / "model.safetensors")
    hub.add_model("me/unpickled", files | {"pytorch_model.bin": pickled(weights)})
    model = studio.load("me/unpickled", allow_pickle=True)
    dataset = studio.upload(messages_jsonl())
    overrides = {"rank": 4, "max_seq_length": 64, "max_steps": 60, "checkpoint_every_steps": 5}
    job = studio.submit(loaded_model_id=model["id"], dataset_id=dataset["id"], overrides=overrides)
    studio.wait_for_step(job["id"], 6)
    local = {item["model_id"]: item for item in studio.http.get("/api/models/local").json()["models"]}
    shutil.rmtree(local["me/unpickled"]["path"])  # the conversion is gone with the engine
    studio.engine().kill()
    job = studio.wait_for_state(job["id"], "succeeded", "failed")
    assert job["state"] == "succeeded" and job["attempts"] == 2, job["error"]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    studio: StudioServer, hub: HubDouble, tiny_files: dict[str, bytes], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    files = {name: data for name, data in tiny_files.items() if name != "model.safetensors"}
    hub.add_model("evil/pickled", files | {"pytorch_model.bin": pickled({"w": Evil(ran)})})
    before = {engine.pid for engine in studio.engines()}
    model = start_load(studio, "evil/pickled", wait_s=60, allow_pickle=True)

    assert (model["state"], model["error"]["type"]) == ("failed", "model-rejected"), model
    assert not ran.exists()
    assert "posix.system" in model["error"]["message"]
    wait_until(lambda: {engine.pid for engine in studio.engines()} <= before)
