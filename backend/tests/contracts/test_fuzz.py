"""Requests made from the OpenAPI document: no error of the server but the documented ones, and nothing leaks."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.server import StudioServer, start_server, wait_until

_COUNTS = re.compile(r"^peft_studio_http_request_seconds_count\{.*\} (\S+)$", re.MULTILINE)
_REQUESTS = 100_000
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# 503 is the Hub, which is not asked here. Streams do not end, and the checks of CUDA take a process and seconds each.
_SETTINGS = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "503"]\n'
_LEFT_OUT = "stream|events|cuda/validate"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[StudioServer]:
    """A server without a Hub and without models, so that no request begins an hour of work."""
    (tmp_path / "models").mkdir()
    with start_server(tmp_path / "home", tmp_path / "models", PEFT_STUDIO_LOG_LEVEL="warning") as server:
        yield server


def _answered(studio: StudioServer) -> int:
    """Return how many requests the server has answered."""
    return int(sum(map(float, _COUNTS.findall(studio.http.get("/metrics").text))))


def _round(studio: StudioServer, folder: Path, seed: int, examples: int) -> None:
    (folder / "schemathesis.toml").write_text(_SETTINGS)
    asked = [f"http://127.0.0.1:{studio.port}/openapi.json", "--checks", _CHECKS, "--exclude-path-regex", _LEFT_OUT]
    # A request may have to load the embedded model first.
    how = ["--request-timeout", "600", "--max-examples", str(examples), "--seed", str(seed)]
    command = [str(Path(sys.executable).with_name("st")), "run", *asked, *how, "--continue-on-failure", "--no-color"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=6 * 3600)
    assert done.returncode == 0, done.stdout[-20_000:]


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_requests_of_the_document_find_no_undocumented_answer_and_leave_nothing(
    alone: StudioServer, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    process = psutil.Process(alone.pid)
    _round(alone, tmp_path, seed=0, examples=5)  # what is made once: threads, connections of the database
    before, files = process.memory_info().rss, process.num_fds()
    seed = 0
    while _answered(alone) < int(os.environ.get("PEFT_STUDIO_TEST_REQUESTS", _REQUESTS)):
        seed += 1
        _round(alone, tmp_path, seed=seed, examples=100)
    for model in alone.http.get("/api/peft/loaded-models").json()["models"]:
        alone.http.delete(f"/api/peft/loaded-models/{model['id']}")
    wait_until(lambda: not alone.engines())
    wait_until(lambda: process.num_fds() <= files + 10)
    record_property("requests", _answered(alone))
    record_property("memory_mib", f"{before >> 20} -> {process.memory_info().rss >> 20}")
    record_property("descriptors", f"{files} -> {process.num_fds()}")
    assert process.memory_info().rss < before + 300 * 2**20
