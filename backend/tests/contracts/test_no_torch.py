"""The API process never imports torch or its kin, whatever is asked of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import BACKEND, CACHE
from tests.support.tiny_model import TINY_ID

# Every operation of the OpenAPI document, called in one fresh interpreter; then what it has imported.
SCRIPT = """
import json, re, sys
from fastapi.testclient import TestClient
from main import create_app

BODIES = {
    "/api/peft/load-model": {"model_id": TINY, "wait_s": 60},
    "/api/peft/configure": {"model_id": TINY, "algorithm": "dora"},
    "/api/models/compatibility": {"model_id": TINY},
    "/api/models/search": {"query": "tiny"},
    "/api/training/jobs": {"model_id": TINY, "dataset_id": "ds_none"},
}
called = {}
with TestClient(create_app(), base_url="http://127.0.0.1") as client:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        if path == "/api/hardware/stream":
            continue  # endless; the same service call as /usage
        for method in operations:
            url = re.sub(r"\\{model_id\\}", TINY, re.sub(r"\\{task\\}", "text-generation", path))
            url = re.sub(r"\\{[a-z_]+\\}", "none", url)
            body = {"json": BODIES.get(path, {})} if method == "post" and path != "/api/datasets" else {}
            if path == "/api/datasets" and method == "post":
                body = {"files": {"file": ("a.jsonl", b'{"prompt": "p", "completion": "c"}')}}
            called[f"{method} {path}"] = client.request(method, url, **body).status_code
kin = ("torch", "transformers", "peft", "trl", "unsloth", "bitsandbytes", "datasets", "engine")
print(json.dumps({"called": called, "imported": [name for name in sys.modules if name.split(".")[0] in kin]}))
"""


@pytest.mark.engine
def test_no_torch_after_every_endpoint_was_called(tmp_path: Path, model_dirs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("TINY", repr(TINY_ID))],
        cwd=BACKEND,
        env={
            "PATH": "/usr/bin:/bin",
            "PEFT_STUDIO_HOME": str(tmp_path),
            "PEFT_STUDIO_MODEL_DIRS": str(model_dirs),
            "PEFT_STUDIO_CACHE_DIR": str(CACHE),
            "HF_HUB_OFFLINE": "1",
            "PEFT_STUDIO_WARM_ENGINE_BYTES": "0",
            "HF_HOME": str(tmp_path / "hf"),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["imported"] == []
    assert len(result["called"]) >= 30
    assert result["called"]["post /api/peft/load-model"] == 200
    assert all(status < 500 for status in result["called"].values()), result["called"]
