"""Models behind the operator's links are served; what is passed over is said at the start and to those who ask."""

import os
from pathlib import Path

import pytest

from tests.support.server import start_server, wait_until
from tests.support.tiny_model import TINY_ID, copy_tiny_model

pytestmark = pytest.mark.engine


def test_models_behind_links_are_served_and_what_is_passed_over_is_said(tmp_path: Path) -> None:
    disk, root = tmp_path / "disk", tmp_path / "models"
    copy_tiny_model(disk / TINY_ID)
    root.mkdir()
    (root / "tests").symlink_to(disk / "tests")  # a folder of models
    (root / "linked").symlink_to(disk / TINY_ID)
    (root / "files").mkdir()
    for file in (disk / TINY_ID).iterdir():
        (root / "files" / file.name).symlink_to(os.path.relpath(file, root / "files"))
    (root / "unmounted").symlink_to(tmp_path / "nothing")
    (root / "loop").symlink_to(root)

    with start_server(tmp_path / "home", root) as studio:
        local = {model["model_id"] for model in studio.http.get("/api/models/local").json()["models"]}
        assert {TINY_ID, "linked", "files"} <= local and not {"unmounted", "loop"} & local
        for model_id in (TINY_ID, "linked", "files"):
            assert studio.http.get(f"/api/models/{model_id}").json()["chat_template"] is True
            loaded = studio.load(model_id)
            studio.generate(loaded["id"], "say 3 twice", max_new_tokens=2)
            studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}")

        for model_id, words in (
            ("unmounted", f"{root}/unmounted is a link to {tmp_path}/nothing, where there is nothing"),
            ("unmounted/m", f"{root}/unmounted is a link to {tmp_path}/nothing, where there is nothing"),
            ("loop", f"{root}/loop is a link back to {root}, in which it lies"),
        ):
            for answer in (
                studio.http.get(f"/api/models/{model_id}"),
                studio.http.post("/api/peft/load-model", json={"model_id": model_id}),
                studio.http.post("/api/peft/configure", json={"model_id": model_id, "algorithm": "lora"}),
            ):
                assert (answer.status_code, answer.json()["type"]) == (404, "/problems/model-not-found"), answer.text
                assert words in answer.json()["detail"] and "HF_HUB_OFFLINE" not in answer.json()["detail"]

        refused = studio.http.delete("/api/models/linked", params={"force": True})
        assert (refused.status_code, refused.json()["type"]) == (403, "/problems/path-not-allowed")
        assert (disk / TINY_ID / "config.json").is_file()

        wait_until(lambda: studio.log_path.read_text().count("model_folder.left_out") == 2)
        said = [line for line in studio.log_path.read_text().splitlines() if "model_folder.left_out" in line]
        assert f"{root}/loop" in said[0] and "in which it lies" in said[0]
        assert f"{root}/unmounted" in said[1] and "where there is nothing" in said[1]


def test_a_model_folder_that_is_not_there_is_named_to_whoever_asks(tmp_path: Path) -> None:
    with start_server(tmp_path / "home", tmp_path / "unmounted") as studio:
        answer = studio.http.get("/api/models/some/model")
        assert answer.status_code == 503
        assert f"{tmp_path}/unmounted of PEFT_STUDIO_MODEL_DIRS does not exist" in answer.json()["detail"]
