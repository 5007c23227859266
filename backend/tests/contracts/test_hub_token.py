"""The Hub token, of the environment or of a request's header: it is sent to the Hub, and appears nowhere else."""

import re
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.hub_double import HubDouble
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server, wait_until

pytestmark = pytest.mark.engine
OF_ENVIRONMENT, OF_HEADER, REVOKED = "hf_CanaryEnvironment", "hf_CanaryHeader", "hf_CanaryRevoked"
CANARY = re.compile(b"hf_Canary")
HEADER = {"X-HF-Token": OF_HEADER}
BASE = re.compile(r"\{[a-z_]+\}")


def test_a_token_reaches_the_hub_and_nothing_else(tmp_path: Path, tiny_path: Path) -> None:
    said: list[tuple[str, bytes]] = []

    def keep(response: httpx.Response) -> None:
        response.read()
        said.append(
            (f"{response.request.method} {response.url.path}", response.content + repr(response.headers).encode())
        )

    with HubDouble() as hub:
        hub.tokens |= {OF_ENVIRONMENT, OF_HEADER}
        files = {path.name: path.read_bytes() for path in tiny_path.iterdir()}
        hub.add_model("me/open", files, pipeline_tag="text-generation")
        for name in ("me/gated", "me/gated-too"):
            hub.add_model(name, files, gated="auto", granted=(OF_HEADER,))
        hub.add_dataset("me/rows", {"train.jsonl": messages_jsonl().encode()}, gated="auto", granted=(OF_HEADER,))
        environment = {
            **{"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": OF_ENVIRONMENT},
            **{"HF_HOME": str(tmp_path / "hf"), "PEFT_STUDIO_CACHE_DIR": str(tmp_path / "cache")},
            "PEFT_STUDIO_LOG_LEVEL": "debug",
        }
        with start_server(tmp_path / "home", tmp_path / "models", **environment) as studio:
            studio.http.event_hooks["response"].append(keep)
            gated = studio.http.get("/api/models/me/gated")
            assert gated.json()["config"] is None
            assert studio.http.get("/api/models/me/gated", headers=HEADER).json()["config"]["layers"] == 2
            body = {"model_id": "me/gated"}
            checked = studio.http.post("/api/models/compatibility", json=body).json()
            assert checked["verdict"] == "unknown" and "gated" in checked["blockers"][0]
            checked = studio.http.post("/api/models/compatibility", json=body, headers=HEADER).json()
            assert checked["verdict"] == "fits" and checked["blockers"] == []
            assert studio.http.post("/api/peft/load-model", json=body).status_code == 403
            loaded = studio.http.post("/api/peft/load-model", json=body | {"wait_s": 120}, headers=HEADER).json()
            assert loaded["state"] == "ready", loaded

            revoked = studio.http.post("/api/models/search", json={}, headers={"X-HF-Token": REVOKED})
            assert (revoked.status_code, revoked.json()["type"]) == (403, "/problems/access-denied")
            for malformed in (b"", b"hf_Canary with a space", "hf_Canary\u00e9".encode(), b"hf_Canary" * 100):
                assert studio.http.get("/api/models/me/open", headers={b"X-HF-Token": malformed}).status_code == 422
            hub.fail("list", status=503, times=9)
            assert studio.http.post("/api/models/search", json={}, headers=HEADER).json()["source"] == "local"
            hub.recover()

            rows = {"hub_id": "me/rows"}
            assert studio.http.post("/api/datasets", json=rows).status_code == 403
            assert studio.http.post("/api/datasets", json=rows, headers=HEADER).status_code == 201
            dataset = studio.upload(messages_jsonl())
            job = studio.submit(
                loaded_model_id=loaded["id"], dataset_id=dataset["id"], overrides={"max_steps": 2, "max_seq_length": 64}
            )
            wait_until(lambda: studio.job(job["id"])["state"] in ("succeeded", "failed"))
            job = studio.job(job["id"])
            assert job["state"] == "succeeded", job
            wanted = {
                "model_id": "me/gated-too",
                "dataset_id": dataset["id"],
                "overrides": {"max_steps": 2, "max_seq_length": 64},
            }
            assert studio.http.post("/api/training/jobs", json=wanted).status_code == 403
            downloaded = studio.http.post("/api/training/jobs", json=wanted, headers=HEADER).json()
            studio.wait_for_state(downloaded["id"], "succeeded")
            pushed = studio.http.post(
                f"/api/adapters/{job['adapter_id']}/push", json={"repo_id": "me/pushed"}, headers=HEADER
            )
            wait_until(lambda: export_of(studio, pushed)["state"] not in ("queued", "running"))
            assert export_of(studio, pushed)["state"] == "succeeded", export_of(studio, pushed)
            again = studio.http.post("/api/adapters", json={"hub_id": "me/pushed"}, headers=HEADER)
            assert again.status_code == 201, again.text
            ids = {
                "job_id": job["id"],
                "adapter_id": job["adapter_id"],
                "export_id": pushed.json()["id"],
                "dataset_id": dataset["id"],
            }
            ids |= {"loaded_model_id": loaded["id"], "model_id": "me/gated", "task": "text-generation"}
            for path, operations in studio.http.get("/openapi.json").json()["paths"].items():
                if "get" in operations and path != "/api/hardware/stream":
                    studio.http.get(BASE.sub(lambda name: ids.get(name[0][1:-1], "none"), path), headers=HEADER)
            engines = studio.engines()
            command_lines = [part for process in [psutil.Process(studio.pid), *engines] for part in process.cmdline()]
            environments = [value for process in engines for value in process.environ().values()]

        assert engines
        assert not [value for value in command_lines + environments if "hf_Canary" in value]
        assert [where for where, content in said if CANARY.search(content)] == []
        assert [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.search(path.read_bytes())] == []
        # huggingface_hub asks a question of its own, without a token, before it pushes.
        asked = [
            seen for seen in hub.seen if seen.route not in ("cdn", "upload") and seen.path != "/api/agent-harnesses"
        ]
        carried = {seen.headers.get("Authorization") for seen in asked}
        assert carried == {f"Bearer {token}" for token in (OF_ENVIRONMENT, OF_HEADER, REVOKED)}
        assert all("Authorization" not in seen.headers for seen in hub.seen if seen.route in ("cdn", "upload"))
        assert {"cdn", "upload", "commit"} <= {seen.route for seen in hub.seen}
        assert not CANARY.search(b"".join(hub.files("me/pushed").values()))


def export_of(studio: StudioServer, pushed: httpx.Response) -> dict[str, Any]:
    return dict(studio.http.get(f"/api/exports/{pushed.json()['id']}").json())
