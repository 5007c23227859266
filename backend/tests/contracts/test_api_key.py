"""With a key set, only /health is open."""

import re
from pathlib import Path

from tests.support.server import start_server


def test_every_route_but_health_wants_the_key(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs, PEFT_STUDIO_API_KEY="sesame-canary") as studio:
        assert studio.http.get("/health").status_code == 200
        key = {"Authorization": "Bearer sesame-canary"}
        document = studio.http.get("/openapi.json", headers=key).json()
        for path, operations in document["paths"].items():
            for method in operations:
                if path == "/health":
                    continue
                url = re.sub(r"\{[a-z_]+\}", "x", path)
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame-canary"}):
                    assert studio.http.request(method, url, headers=headers).status_code == 401, (method, path)
        assert studio.http.get("/docs").status_code == 401
        assert studio.http.get("/api/peft/use-cases", headers=key).status_code == 200
    assert "sesame-canary" not in studio.log_path.read_text()
