"""Exports through a real server and real engines."""

import io
import json
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.adapter_double import adapter_files, adapter_tensors, write_files
from tests.support.hub_double import safetensors_bytes
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.stock_peft import in_stock_peft
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
OVERRIDES = {"rank": 4, "max_seq_length": 64, "learning_rate": 0.01, "max_steps": 6}
PROBE = [[5, 9, 17, 33, 21, 8]]


def train(studio: StudioServer, algorithm: str = "lora", **overrides: Any) -> str:
    """Train an adapter and return its id."""
    dataset = studio.upload(messages_jsonl())
    job = studio.submit(
        model_id=TINY_ID, dataset_id=dataset["id"], algorithm=algorithm, overrides=OVERRIDES | overrides
    )
    studio.events(job["id"])
    job = studio.job(job["id"])
    assert job["state"] == "succeeded", job["error"]
    return str(job["adapter_id"])


def export(studio: StudioServer, adapter_id: str, **body: Any) -> dict[str, Any]:
    response = studio.http.post(f"/api/adapters/{adapter_id}/export", json={"format": "merged"} | body)
    assert response.status_code == 202, response.text
    assert response.headers["Location"] == f"/api/exports/{response.json()['id']}"
    return dict(response.json())


def state_of(studio: StudioServer, export_id: str) -> dict[str, Any]:
    return dict(studio.http.get(f"/api/exports/{export_id}").json())


def finished(studio: StudioServer, export_id: str) -> dict[str, Any]:
    wait_until(lambda: state_of(studio, export_id)["state"] in ("succeeded", "failed", "cancelled"))
    return state_of(studio, export_id)


@pytest.fixture(scope="module")
def adapter_id(studio: StudioServer) -> str:
    return train(studio)


@pytest.mark.parametrize("algorithm", ["lora", "qlora"])
def test_a_merged_model_is_downloaded_and_answers_as_stock_peft_does(
    studio: StudioServer, adapter_id: str, tiny_path: Path, tmp_path: Path, algorithm: str
) -> None:
    adapter_id = adapter_id if algorithm == "lora" else train(studio, algorithm)
    done = finished(studio, export(studio, adapter_id)["id"])
    assert done["state"] == "succeeded", done["error"]
    assert [change["state"] for change in done["history"]] == ["queued", "running", "succeeded"]

    content = studio.http.get(f"/api/exports/{done['id']}/download").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
    assert {(path.name, path.stat().st_size) for path in tmp_path.iterdir()} == {
        (file["name"], file["size_bytes"]) for file in done["files"]
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(PROBE), use_cache=False).logits
    folder = Path(studio.http.get(f"/api/adapters/{adapter_id}").json()["path"])
    expression = f"model(input_ids=torch.tensor({PROBE}), use_cache=False).logits.tolist()"
    stock = in_stock_peft(tiny_path, folder, expression, four_bit=algorithm == "qlora")
    assert (found - torch.tensor(stock)).abs().max() <= 2e-5
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is not None
    assert json.loads((tmp_path / "export.json").read_text())["adapter_id"] == adapter_id
    assert any("4-bit" in note for note in done["result"]["notes"]) == (algorithm == "qlora")


def test_a_file_is_downloaded_in_parts_and_an_export_deleted(studio: StudioServer, adapter_id: str) -> None:
    done = finished(studio, export(studio, adapter_id)["id"])
    url = f"/api/exports/{done['id']}/files/model.safetensors"
    whole = studio.http.get(url).content
    rest = studio.http.get(url, headers={"Range": "bytes=100-"})
    assert rest.status_code == 206 and rest.content == whole[100:]
    assert load_file(Path(done["path"]) / "model.safetensors").keys()
    for name in ("none", "..%2f..%2fstudio.db", "%2e%2e"):
        assert studio.http.get(f"/api/exports/{done['id']}/files/{name}").status_code == 404
    listed = studio.http.get("/api/exports", params={"adapter_id": adapter_id}).json()["exports"]
    assert done["id"] in [entry["id"] for entry in listed]
    assert studio.http.get("/api/exports", params={"adapter_id": "adp_none"}).json() == {"exports": []}
    assert studio.http.post(f"/api/exports/{done['id']}/cancel").status_code == 409
    assert studio.http.delete(f"/api/exports/{done['id']}").status_code == 204
    assert studio.http.get(f"/api/exports/{done['id']}").json()["type"] == "/problems/export-not-found"
    assert not Path(done["path"]).exists()


def test_a_gguf_is_downloaded_and_read_back(studio: StudioServer, adapter_id: str, tmp_path: Path) -> None:
    merged = finished(studio, export(studio, adapter_id)["id"])
    done = finished(studio, export(studio, adapter_id, format="gguf", quantization="f32")["id"])
    assert done["state"] == "succeeded", done["error"]
    assert done["settings"] == {"quantization": "f32"} and done["kind"] == "gguf"
    name = done["result"]["filename"]
    (tmp_path / name).write_bytes(studio.http.get(f"/api/exports/{done['id']}/files/{name}").content)
    probe = torch.tensor(PROBE)
    with torch.no_grad():
        models = (
            AutoModelForCausalLM.from_pretrained(merged["path"]).eval(),
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32).eval(),
        )
        first, second = (model(input_ids=probe, use_cache=False).logits for model in models)
    assert (first - second).abs().max() <= 2e-5
    assert finished(studio, export(studio, adapter_id, format="gguf")["id"])["settings"] == {"quantization": "f16"}


def test_what_has_no_place_in_gguf_is_refused_at_the_door(studio: StudioServer, model_dirs: Path) -> None:
    source = write_files(studio.home / "inbox", adapter_files(base_model_name_or_path="tests/other"))
    other = model_dirs / "tests" / "other"
    shutil.copytree(model_dirs / TINY_ID, other)
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["GPTNeoXForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    adapter = studio.http.post("/api/adapters", json={"path": str(source)}).json()
    before = studio.http.get("/api/exports").json()
    response = studio.http.post(f"/api/adapters/{adapter['id']}/export", json={"format": "gguf"})
    assert (response.status_code, response.json()["type"]) == (422, "/problems/export-rejected")
    assert "GPTNeoXForCausalLM" in response.json()["detail"] and "LlamaForCausalLM" in response.json()["detail"]
    for body in (
        {"format": "merged", "quantization": "q8_0"},
        {"format": "gguf", "quantization": "q4_k_m"},
        {"format": "gguf", "quantization": None, "x": 1},
    ):
        assert studio.http.post(f"/api/adapters/{adapter['id']}/export", json=body).status_code == 422
    assert studio.http.get("/api/exports").json() == before
    studio.http.delete(f"/api/adapters/{adapter['id']}")
    shutil.rmtree(other)


def endless(studio: StudioServer) -> str:
    """Start a job that holds the base until it is cancelled."""
    dataset = studio.upload(messages_jsonl())
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides=OVERRIDES | {"max_steps": 10**6})
    studio.wait_for_step(job["id"], 1)
    return str(job["id"])


def waiting_for(studio: StudioServer, export_id: str, job_id: str) -> bool:
    progress = state_of(studio, export_id)["progress"]
    return progress is not None and job_id in progress["stage"]


def test_exports_wait_for_the_base_and_survive_a_killed_and_a_stopped_server(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path / "home", model_dirs) as studio:
        adapter_id = train(studio)
        job_id = endless(studio)
        first, second, third = (export(studio, adapter_id)["id"] for _ in range(3))
        wait_until(lambda: waiting_for(studio, first, job_id))
        in_use = studio.http.delete(f"/api/adapters/{adapter_id}")
        assert (in_use.status_code, in_use.json()["type"]) == (409, "/problems/adapter-in-use")
        assert studio.http.post(f"/api/exports/{first}/cancel").status_code == 202
        assert finished(studio, first)["state"] == "cancelled"
        wait_until(lambda: waiting_for(studio, second, job_id))

        studio.kill()
        studio.start()
        wait_until(lambda: state_of(studio, second)["state"] == "running")
        studio.stop()
        studio.start()
        studio.http.post(f"/api/training/jobs/{job_id}/cancel")
        states = [(done["state"], done["attempts"]) for done in (finished(studio, second), finished(studio, third))]
        assert states == [("succeeded", 3), ("succeeded", 1)]
        assert sorted(path.name for path in (studio.home / "exports").iterdir()) == sorted([second, third])
        assert studio.http.delete(f"/api/adapters/{adapter_id}").status_code == 204
        assert state_of(studio, second)["state"] == "succeeded"  # what was made of it stays


def test_a_damaged_adapter_is_not_exported(studio: StudioServer) -> None:
    adapter_id = train(studio)
    weights = Path(studio.http.get(f"/api/adapters/{adapter_id}").json()["path"]) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = finished(studio, export(studio, adapter_id)["id"])
    assert (done["state"], done["error"]["class"]) == ("failed", "adapter_damaged"), done
    assert "adapter_model.safetensors" in done["error"]["message"]
    assert done["files"] == [] and done["path"] is None


def test_an_engine_or_a_server_killed_in_the_middle_and_a_cancelled_export_leave_nothing(
    tmp_path: Path, model_dirs: Path
) -> None:
    """With the embedded model, whose export takes seconds: there is a middle."""
    files = adapter_files(base_model_name_or_path=EMBEDDED_ID, target_modules=["q_proj"])
    files["adapter_model.safetensors"] = safetensors_bytes(adapter_tensors(30, {"q_proj": (576, 576)}))
    with start_server(tmp_path / "home", model_dirs) as studio:
        source = write_files(studio.home / "inbox", files)
        adapter_id = studio.http.post("/api/adapters", json={"path": str(source)}).json()["id"]

        def half_way() -> str:
            export_id = export(studio, adapter_id, format="gguf", quantization="q8_0")["id"]
            wait_until(lambda: _fraction(state_of(studio, export_id)) > 0.02)
            assert list((studio.home / "exports").glob(".exp_*"))
            return str(export_id)

        export_id = half_way()
        studio.engine().send_signal(signal.SIGKILL)
        failed = finished(studio, export_id)
        assert (failed["state"], failed["error"]["class"], failed["error"]["signal"]) == ("failed", "engine_killed", 9)
        assert not list((studio.home / "exports").iterdir()) or not failed["files"]

        export_id = half_way()
        studio.http.post(f"/api/exports/{export_id}/cancel")
        assert finished(studio, export_id)["state"] == "cancelled"
        assert not list((studio.home / "exports").glob(f"*{export_id}*"))

        export_id = half_way()
        studio.kill()
        studio.start()
        done = finished(studio, export_id)
        assert (done["state"], done["attempts"]) == ("succeeded", 2), done
        assert [path.name for path in (studio.home / "exports").iterdir()] == [export_id]
        reader = GGUFReader(Path(done["path"]) / done["result"]["filename"])
        assert len(reader.tensors) == 272 and done["result"]["adapted_layers"] == 30


def _fraction(shown: dict[str, Any]) -> float:
    assert shown["state"] in ("queued", "running"), shown
    progress = shown["progress"]
    return progress["fraction"] or 0.0 if progress is not None and progress["stage"] == "writing" else 0.0
