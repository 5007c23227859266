"""A real server and its settings: what is wrong is one plain line and exit status 2; what is not there is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import BACKEND, StudioServer, start_server, wait_until
from tests.support.shapes import keep_shape
from tests.support.tiny_model import TINY_ID


def start_and_end(tmp_path: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `python main.py`, which is to end by itself, in a folder that it could leave something in."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PEFT_STUDIO_")}
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(BACKEND / "main.py")],
        cwd=work,
        env=clean
        | {"PEFT_STUDIO_HOME": str(tmp_path / "home"), "PEFT_STUDIO_PORT": "0", "HF_HUB_OFFLINE": "1"}
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not list(work.iterdir())
    return done


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HOEM", "/x", "did you mean PEFT_STUDIO_HOME?"),
        ("PORT", "70000", "65535"),
        ("HOME", "data", "not a full path"),
        ("MODEL_DIRS", "$HOME/models", "not a full path"),
        ("HOST", "no-such-host.invalid", "PEFT_STUDIO_HOST=no-such-host.invalid: "),
        ("DATABASE_URL", "canary", "not a database URL"),
        ("DATABASE_URL", "postgresql+nodriver://u:canary@host/name", "the database cannot be used"),
        ("DATABASE_URL", "sqlite:////proc/none/studio.db", "the database cannot be used"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_name_and_exit_status_2(
    tmp_path: Path, name: str, value: str, words: str
) -> None:
    key = {"PEFT_STUDIO_API_KEY": "k"} if name == "HOST" else {}
    done = start_and_end(tmp_path, **{f"PEFT_STUDIO_{name}": value}, **key)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"peft-studio: PEFT_STUDIO_{name}") and words in line
    assert "canary" not in line and done.stdout == ""


@pytest.mark.parametrize("name", ["HOME", "CACHE_DIR"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    done = start_and_end(tmp_path, **{f"PEFT_STUDIO_{name}": str(folder)})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"peft-studio: PEFT_STUDIO_{name}={folder}: ")


def test_a_home_that_cannot_be_written_is_named(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = start_and_end(tmp_path, PEFT_STUDIO_HOME=str(small_disk))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"peft-studio: PEFT_STUDIO_HOME={small_disk}: ") and "Read-only file system" in line


def local_models(studio: StudioServer) -> list[str]:
    return [model["model_id"] for model in studio.http.get("/api/models/local").json()["models"]]


def test_model_folders_that_are_not_there_are_said_at_start_and_used_once_they_are(
    tmp_path: Path, model_dirs: Path
) -> None:
    missing, late = tmp_path / "misspelt", tmp_path / "late"
    studio = start_server(
        tmp_path / "home", model_dirs, HOME=str(tmp_path), PEFT_STUDIO_MODEL_DIRS=f"{missing}:~/late:{model_dirs}"
    )
    studio._environment["PEFT_STUDIO_LOG_LEVEL"] = "warning"
    # What the shell would have expanded: the server does, in the home that HOME names.
    studio._environment["PEFT_STUDIO_HOME"] = "~/home"
    studio._environment["PEFT_STUDIO_CACHE_DIR"] = "~/cache"
    keep_shape(tmp_path / "cache", json.loads((model_dirs / TINY_ID / "config.json").read_text()))
    with studio:
        said = [line for line in studio.log_path.read_text().splitlines() if "model_folder.left_out" in line]
        assert len(said) == 2, said
        for folder, line in zip((missing, late), said, strict=True):
            assert f"path={folder} " in line and "does not exist" in line and "PEFT_STUDIO_MODEL_DIRS" in line
        assert TINY_ID in local_models(studio)
        shutil.copytree(model_dirs / TINY_ID, late / "another")
        assert "another" in local_models(studio)
        assert (tmp_path / "home" / "server.lock").exists() and (tmp_path / "cache").is_dir()
    assert not (BACKEND / "~").exists()


@pytest.mark.engine
def test_engines_are_as_nice_as_the_setting_says(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs, PEFT_STUDIO_ENGINE_NICE="3", PEFT_STUDIO_EXECUTOR="local") as studio:
        body = {"model_id": TINY_ID, "algorithm": "lora", "wait_s": 0}  # an engine is so before it loads anything
        assert studio.http.post("/api/peft/load-model", json=body).status_code == 202
        engine = studio.engine()
        own = os.getpriority(os.PRIO_PROCESS, studio.pid)
        wait_until(lambda: engine.nice() == min(own + 3, 19))
