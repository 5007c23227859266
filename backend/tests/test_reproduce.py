"""`python -m reproduce` trains an adapter again from its card, over HTTP, and says whether it is the same."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from core.manifest import verify
from reproduce import Adapter, CannotReproduce, RunCard, compare, main, read_adapter
from tests.support.rows import messages_jsonl
from tests.support.server import BACKEND, StudioServer, start_server
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
# All that could make two runs differ: dropout, shuffling, accumulation, warm-up, evaluation, a PiSSA decomposition.
OVERRIDES = {
    "rank": 4,
    "max_seq_length": 64,
    "learning_rate": 0.01,
    "max_steps": 12,
    "dropout": 0.1,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "warmup_ratio": 0.2,
    "eval_every_steps": 4,
    "seed": 7,
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    with start_server(tmp_path_factory.mktemp("home"), model_dirs, PEFT_STUDIO_API_KEY="sesame") as server:
        server.http.headers["Authorization"] = "Bearer sesame"
        yield server


def reproduce(studio: StudioServer, *arguments: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{studio.port}"
    done = subprocess.run(
        [sys.executable, "-m", "reproduce", *arguments, "--server", url],
        cwd=BACKEND,
        env={"PATH": "/usr/bin:/bin", "PEFT_STUDIO_API_KEY": "sesame"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(studio: StudioServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An adapter as one downloads it, and the files that it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    text = messages_jsonl().replace('"messages"', '"talk"')
    (folder / "talks.jsonl").write_text(text)
    (folder / "held-out.jsonl").write_text(messages_jsonl(5))
    dataset = studio.upload(text, "talks.jsonl", column_map=json.dumps({"messages": "talk"}))
    validation = studio.upload(messages_jsonl(5), "held-out.jsonl")
    job = studio.submit(
        model_id=TINY_ID,
        dataset_id=dataset["id"],
        validation_dataset_id=validation["id"],
        algorithm="pissa",
        overrides=OVERRIDES,
    )
    studio.events(job["id"])
    job = studio.job(job["id"])
    assert job["state"] == "succeeded", job["error"]
    adapter = studio.http.get(f"/api/adapters/{job['adapter_id']}").json()
    (folder / "adapter.zip").write_bytes(studio.http.get(f"/api/adapters/{adapter['id']}/download").content)
    shutil.unpack_archive(folder / "adapter.zip", folder / "adapter")
    losses = studio.metrics(job["id"])
    for path in (f"training/jobs/{job['id']}", f"datasets/{dataset['id']}", f"datasets/{validation['id']}"):
        assert studio.http.delete(f"/api/{path}").status_code == 204
    return {"folder": folder, "adapter": adapter, "dataset": dataset, "validation": validation, "losses": losses}


def test_the_card_says_what_the_adapter_was_made_from(trained: dict[str, Any]) -> None:
    adapter, folder = trained["adapter"], trained["folder"] / "adapter"
    card = json.loads((folder / "training.json").read_text())
    assert adapter["card"] == {name: value for name, value in card.items() if name != "losses"}
    assert dict(map(tuple, card["losses"])) == trained["losses"]
    assert card["config"] == adapter["config"] and card["config"]["seed"] == 7
    assert (card["base_model_id"], card["algorithm"], card["base_commit"]) == (TINY_ID, "pissa", None)
    assert card["dataset_sha256"] == card["dataset"]["sha256"] == trained["dataset"]["sha256"]
    assert card["dataset"]["settings"]["column_map"] == {"messages": "talk"}
    assert card["validation_dataset"]["sha256"] == trained["validation"]["sha256"]
    assert {"torch", "peft", "transformers"} <= card["packages"].keys()
    assert card["machine"]["threads"] >= 1 and card["outcome"]["steps"] == 12
    readme = (folder / "README.md").read_text()
    for words in ("python -m reproduce", trained["dataset"]["sha256"], "seed 7", card["packages"]["peft"], TINY_ID):
        assert words in readme
    assert verify(folder) == {"adapter_id": adapter["id"]}


def test_the_same_run_again_gives_the_same_bits(studio: StudioServer, trained: dict[str, Any]) -> None:
    folder = trained["folder"]
    files = ("--dataset", str(folder / "talks.jsonl"), "--validation-dataset", str(folder / "held-out.jsonl"))
    code, said = reproduce(studio, str(folder / "adapter.zip"), *files)
    assert code == 0, said
    assert "losses of 12 steps: 12 the same to the bit" in said
    assert "weights: the same to the bit" in said and "Reproduced: the same bits" in said
    # The datasets are on the server by now, and found by their sums; a folder does as well as a zip.
    code, said = reproduce(studio, str(folder / "adapter"))
    assert code == 0, said


def spoil(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    card = json.loads((target / "training.json").read_text())
    change(card)
    (target / "training.json").write_text(json.dumps(card))
    return target


def test_another_run_is_told_apart(studio: StudioServer, trained: dict[str, Any], tmp_path: Path) -> None:
    folder = trained["folder"]
    files = ("--dataset", str(folder / "talks.jsonl"), "--validation-dataset", str(folder / "held-out.jsonl"))
    other = spoil(folder / "adapter", tmp_path / "seed", lambda card: card["config"].update(seed=8))
    code, said = reproduce(studio, str(other), *files)
    assert code == 1 and "NOT reproduced" in said and "DIFFERENT" in said, said


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda card: card.update(rows_sha256="0" * 64), ("--dataset", "talks.jsonl"), "has other rows"),
        (lambda card: card["dataset"].update(sha256="0" * 64), (), "has no dataset"),
        (lambda card: card.update(base_model_id="nobody/knows"), ("--dataset", "talks.jsonl"), "/api/training/jobs"),
        (lambda card: card.pop("config"), (), "no adapter with a card"),
        (lambda card: card.pop("losses"), (), "losses: Field required"),
        (lambda card: card.update(machine=[]), (), "machine: Input should be"),
        (lambda card: card.update(base_model_id="a/\x1b[2Jb"), (), "cannot be printed"),
        (lambda card: card.update(resumed_from="job_1/step-00000004"), (), "another job"),
        (lambda card: card["outcome"].update(stopped_on_request=True), (), "ended by a client after step 12"),
        (lambda card: card["config"].update(rank="4"), ("--dataset", "talks.jsonl"), "rank"),
    ],
)
def test_what_cannot_be_run_again_is_said(
    studio: StudioServer,
    trained: dict[str, Any],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    folder = trained["folder"]
    spoiled = spoil(folder / "adapter", tmp_path / "spoiled", change)
    given = [str(folder / part) if part.endswith("jsonl") else part for part in arguments]
    code, said = reproduce(studio, str(spoiled), *given, "--validation-dataset", str(folder / "held-out.jsonl"))
    assert code == 2 and words in said, said


def test_no_server_and_no_adapter_are_said(trained: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reproduce", str(trained["folder"] / "adapter"), "--server", "http://127.0.0.1:9"],
        cwd=BACKEND, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "does not answer" in done.stderr
    (tmp_path / "x.zip").write_bytes(b"no zip")
    done = subprocess.run(
        [sys.executable, "-m", "reproduce", str(tmp_path / "x.zip")], cwd=BACKEND, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no adapter with a card" in done.stderr


def test_another_machine_may_round_otherwise_and_the_same_may_not(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = read_adapter(trained["folder"] / "adapter")
    nudged = [[step, loss * 1.001] for step, loss in first.card["losses"]]

    def other(**changes: Any) -> RunCard:
        return cast(RunCard, first.card | changes)

    elsewhere = other(losses=nudged, machine=first.card["machine"] | {"threads": 64})
    assert compare(first, first, None)
    assert not compare(first, Adapter(other(losses=nudged), first.weights_sha256), None)
    assert not compare(first, Adapter(first.card, "0" * 64), None)
    fewer = other(machine=elsewhere["machine"], outcome=first.card["outcome"] | {"steps": 11})
    assert not compare(first, Adapter(fewer, "0" * 64), None), "counts have no tolerance"
    assert compare(first, Adapter(elsewhere, "0" * 64), None)
    assert "threads" in capsys.readouterr().out
    assert not compare(first, Adapter(elsewhere, "0" * 64), 1e-6)


def _zip_of(card: str, how: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", how) as archive:
        archive.writestr("training.json", card)
        archive.writestr("adapter_model.safetensors", b"weights" * 100)
    return packed.getvalue()


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_damaged_data_is_no_adapter(how: int) -> None:
    whole = _zip_of(json.dumps({"losses": list(range(500))}), how)
    begin = len("training.json") + 30  # of its data, after the local header
    with pytest.raises(CannotReproduce, match="is no adapter"):
        read_adapter(io.BytesIO(whole[:begin] + b"\xff" * 60 + whole[begin + 60 :]))


def test_a_card_cannot_steer_the_terminal_by_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.zip").write_bytes(_zip_of(json.dumps({"packages": {"\x1b[2J\u202e": 5}})))
    assert main([str(tmp_path / "x.zip")]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[2J\\u202e" in said and said.rstrip("\n").isprintable()


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_a_card_with_numbers_that_cannot_be_sent_is_refused(
    trained: dict[str, Any], tmp_path: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (trained["folder"] / "adapter" / "training.json").read_text()
    (tmp_path / "x.zip").write_bytes(_zip_of(text.replace('"learning_rate": 0.01', f'"learning_rate": {number}')))
    assert main([str(tmp_path / "x.zip"), "--server", "http://127.0.0.1:9"]) == 2
    assert "no adapter with a card" in capsys.readouterr().err
