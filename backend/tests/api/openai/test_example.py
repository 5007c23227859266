"""The example runs as it is, and goes on when the server is killed under it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import BACKEND, StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
EXAMPLE = BACKEND.parent / "examples" / "openai_finetune.py"
ROWS = BACKEND.parent / "quickstart" / "pip_the_parrot.jsonl"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def start(studio: StudioServer, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"OPENAI_BASE_URL": f"http://127.0.0.1:{studio.port}/v1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_example_runs_to_its_end(studio: StudioServer) -> None:
    with start(studio, TINY_ID) as example:
        said, _ = example.communicate(timeout=250)
    assert example.returncode == 0, said
    assert "The job has successfully completed" in said and "ckpt-step-" in said
    assert f"ft:{TINY_ID}:local:pip:" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_on_the_embedded_model_survives_a_killed_server(
    tmp_path: Path, model_dirs: Path, embedded_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(ROWS.read_text("utf-8").splitlines(keepends=True)[:24]), "utf-8")
    home = tmp_path / "home"
    with start_server(home, model_dirs) as studio, start(studio, EMBEDDED_ID, str(rows)) as example:

        def jobs() -> list[dict[str, object]]:
            return list(studio.http.get("/api/training/jobs").json()["jobs"])

        wait_until(jobs)
        job_id = str(jobs()[0]["id"])
        studio.wait_for_step(job_id, 8)
        studio.kill()
        studio.start()
        said, _ = example.communicate(timeout=900)
        assert example.returncode == 0, said
        assert studio.job(job_id)["attempts"] == 2 and len(jobs()) == 1
        answers = [line for line in said.splitlines() if line.startswith("ft:")]
    assert "Pip" in answers[0] or "Squawk" in answers[0], said
    assert len(answers) > 1 and answers[0].partition(": ")[2] == answers[1].partition(": ")[2]  # the last checkpoint
