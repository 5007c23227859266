"""Datasets over HTTP, to a real server whose reader is a process of its own."""

import io
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import openpyxl
import pytest

from tests.support.datasets_double import as_csv, as_jsonl, as_parquet, gzipped, left_in
from tests.support.server import StudioServer, start_server, wait_until

PAIRS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(30)]
LIMIT_BYTES = 2**20


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Any:
    home = tmp_path_factory.mktemp("home")
    with start_server(home, model_dirs, PEFT_STUDIO_MAX_UPLOAD_BYTES=str(LIMIT_BYTES)) as server:
        yield server


def send(studio: StudioServer, content: bytes, filename: str = "a.jsonl", **form: str) -> httpx.Response:
    return studio.http.post("/api/datasets", files={"file": (filename, content)}, data=form)


@pytest.mark.parametrize(
    ("content", "filename", "detected"),
    [
        (as_jsonl(PAIRS), "a.jsonl", "JSONL, utf-8"),
        (gzipped(as_csv(PAIRS, "\t")), "a.csv.gz", "a table separated by tabs, gzip, utf-8"),
        (as_parquet(PAIRS), "a.parquet", "Parquet"),
    ],
)
def test_a_file_is_stored_shown_and_handed_out(
    studio: StudioServer, content: bytes, filename: str, detected: str
) -> None:
    response = send(studio, content, filename, name="pairs")
    assert response.status_code == 201, response.text
    dataset = response.json()
    assert (dataset["name"], dataset["rows"], dataset["format"]) == ("pairs", 30, "prompt_completion")
    assert dataset["detected"] == [detected, "prompt_completion: 'prompt' and 'completion' in the first 30 rows"]
    assert dataset["source"] == {"kind": "upload", "filename": filename}
    url = f"/api/datasets/{dataset['id']}"
    assert studio.http.get(url).json() == dataset
    row = studio.http.get(f"{url}/preview?offset=29").json()["rows"][0]
    assert [turn["content"] for turn in row["messages"]] == ["p29", "c29"]
    original = studio.http.get(f"{url}/download")
    assert original.content == content
    assert filename in original.headers["content-disposition"]
    normal = studio.http.get(f"{url}/download?form=normalised").content
    again = send(studio, normal).json()
    assert studio.http.get(f"/api/datasets/{again['id']}/download?form=normalised").content == normal
    assert studio.http.delete(url).status_code == 204
    assert studio.http.get(f"{url}/download").status_code == 404


@pytest.mark.parametrize(
    ("form", "status", "kind", "words"),
    [
        ({"format": "alpacca"}, 422, "invalid-request", "format"),
        ({"column_map": "{"}, 422, "invalid-request", "not JSON"),
        ({"column_map": '{"prompt": 1}'}, 422, "invalid-request", "column_map"),
        ({"column_map": '{"prompt": "nothing"}'}, 422, "dataset-rejected", "nothing"),
        ({"format": "preference"}, 422, "dataset-rejected", "chosen"),
        ({"shuffle": "true"}, 422, "invalid-request", "shuffle"),
        ({"name": "a\nb"}, 422, "invalid-request", "name"),
        ({"encoding": "klingon"}, 422, "dataset-rejected", "klingon"),
        ({"encoding": "utf-16"}, 422, "dataset-rejected", "utf-16"),
    ],
)
def test_settings_take_effect_or_are_refused(
    studio: StudioServer, form: dict[str, str], status: int, kind: str, words: str
) -> None:
    response = send(studio, as_jsonl(PAIRS), **form)
    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{kind}")
    assert words in response.json()["detail"]


def test_columns_are_mapped_in_a_form(studio: StudioServer) -> None:
    rows = [{"ask": "q", "replies": [{"text": "a"}]}]
    response = send(studio, as_jsonl(rows), column_map='{"prompt": "ask", "completion": "replies.0.text"}')
    assert response.status_code == 201, response.text
    assert response.json()["detected"][1].startswith("prompt_completion: the client said column_map=")


def workbook(rows: list[list[Any]]) -> bytes:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "filename", "form"),
    [
        (b"v1,v2,,,\nc,    p\n,,,,x\n".replace(b"p\n", b"p,,,\n"), "a.csv", {"on_bad_rows": "skip"}),
        (workbook([["v1", "v2"], ["c", "    p"]]), "a.xlsx", {}),
        (b'{"v1":{"0":"c"},"v2":{"0":"    p"}}', "a.json", {}),
        (b"sep=;\r\nv1;v2\r\nc;    p\r\n", "a.csv", {}),
    ],
)
def test_tables_of_spreadsheets_and_pandas_are_read_with_a_column_map(
    studio: StudioServer, content: bytes, filename: str, form: dict[str, str]
) -> None:
    response = send(studio, content, filename, column_map='{"completion": "v1", "prompt": "v2"}', **form)
    assert response.status_code == 201, response.text
    rows = studio.http.get(f"/api/datasets/{response.json()['id']}/preview").json()["rows"]
    assert [[turn["content"] for turn in row["messages"]] for row in rows] == [["    p", "c"]]


def test_what_is_no_dataset_is_named(studio: StudioServer) -> None:
    response = send(studio, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "a.xls")
    assert (response.status_code, ".xls" in response.json()["detail"]) == (422, True)


def test_a_greeting_and_a_later_system_turn_are_taken_and_said(studio: StudioServer) -> None:
    turns = [
        {"role": role, "content": role} for role in ("assistant", "user", "assistant", "system", "user", "assistant")
    ]
    turns[0]["weight"] = 0  # type: ignore[assignment]
    response = send(studio, as_jsonl([{"messages": turns}]))
    assert response.status_code == 201, response.text
    assert any("begin with an answer" in warning for warning in response.json()["warnings"])
    assert any("system turn behind the first" in warning for warning in response.json()["warnings"])


def test_bad_rows_come_back_by_line(studio: StudioServer) -> None:
    content = as_jsonl(PAIRS[:2]) + b"\n{broken\n"
    problem = send(studio, content).json()
    assert [error["line"] for error in problem["errors"]] == [3]
    assert (problem["rejected_rows"], problem["good_rows"]) == (1, 2)
    assert send(studio, content, on_bad_rows="skip").json()["rejected_rows"] == 1


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n{}\r\n", 422, "malformed-upload"),
        (
            b"--x\r\nContent-Disposition: form-data; name=other; filename=a\r\n\r\n{}\r\n--x--\r\n",
            422,
            "malformed-upload",
        ),
        (b"--x\r\nContent-Disposition: form-data; name=name\r\n\r\nn\r\n--x--\r\n", 422, "invalid-request"),
        (
            b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n{}\r\n"
            b"--x\r\nContent-Disposition: form-data; name=file; filename=b\r\n\r\n{}\r\n--x--\r\n",
            422,
            "malformed-upload",
        ),
        (b"nonsense", 422, "malformed-upload"),
    ],
)
def test_a_malformed_upload_is_refused_and_leaves_nothing(
    studio: StudioServer, body: bytes, status: int, kind: str
) -> None:
    before = left_in(studio.home / "datasets")
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = studio.http.post("/api/datasets", content=body, headers=headers)
    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{kind}")
    assert left_in(studio.home / "datasets") == before
    assert studio.http.get("/api/datasets/imports").json() == {"imports": []}


def test_an_upload_over_the_limit_is_refused_even_if_it_does_not_say_so(studio: StudioServer) -> None:
    before = left_in(studio.home / "datasets")

    def parts() -> Any:
        yield b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n"
        for _ in range(64):
            yield b"x" * 2**16

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = studio.http.post("/api/datasets", content=parts(), headers=headers)
    assert (response.status_code, response.json()["type"]) == (413, "/problems/too-large")
    assert left_in(studio.home / "datasets") == before


def test_a_client_that_drops_leaves_nothing(studio: StudioServer) -> None:
    before = left_in(studio.home / "datasets")
    with socket.create_connection(("127.0.0.1", studio.port)) as connection:
        connection.sendall(
            b"POST /api/datasets HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b"--x\r\nContent-Disposition: form-data; name=file; filename=half.jsonl\r\n\r\n" + b"x" * 300_000
        )
        wait_until(lambda: studio.http.get("/api/datasets/imports").json()["imports"])
        wait_until(lambda: studio.http.get("/api/datasets/imports").json()["imports"][0]["received_bytes"] >= 250_000)
        shown = studio.http.get("/api/datasets/imports").json()["imports"][0]
        assert (shown["stage"], shown["total_bytes"]) == ("receiving", 900_000)
        assert left_in(studio.home / "datasets") != before
    wait_until(lambda: studio.http.get("/api/datasets/imports").json() == {"imports": []})
    assert left_in(studio.home / "datasets") == before
    assert not any("half" in dataset["name"] for dataset in studio.http.get("/api/datasets").json()["datasets"])


def test_preferences_are_shown_and_a_job_that_learns_answers_is_refused_on_them(studio: StudioServer) -> None:
    dataset = send(studio, b'{"prompt": "q", "chosen": "a", "rejected": "b"}').json()
    assert (dataset["format"], dataset["trainable"], dataset["objectives"]) == ("preference", True, ["dpo", "orpo"])
    row = studio.http.get(f"/api/datasets/{dataset['id']}/preview").json()["rows"][0]
    assert row["messages"] is None and row["chosen"][0]["content"] == "a"
    body: dict[str, Any] = {
        "model_id": "tests/tiny-llama", "dataset_id": dataset["id"], "overrides": {"objective": "sft"},
    }  # fmt: skip
    response = studio.http.post("/api/training/jobs", json=body)
    assert (response.status_code, response.json()["type"]) == (422, "/problems/dataset-not-trainable")
    assert "dpo or orpo" in response.json()["detail"]
    body = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    dataset = send(studio, json.dumps(body).encode()).json()
    body = {"model_id": "tests/tiny-llama", "dataset_id": dataset["id"]}
    response = studio.http.post("/api/training/jobs", json=body)
    assert (response.status_code, response.json()["type"]) == (422, "/problems/dataset-not-trainable")


def test_a_dataset_is_taken_from_the_imports_folder(studio: StudioServer) -> None:
    folder = studio.home / "imports" / "pairs"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(as_jsonl(PAIRS))
    response = studio.http.post("/api/datasets", json={"path": "pairs", "name": "from here"})
    assert response.status_code == 201, response.text
    assert response.json()["name"] == "from here"
    assert response.json()["source"]["files"] == ["train.jsonl"]
    mapped = {"path": "pairs/train.jsonl", "column_map": {"text": "prompt"}}
    assert studio.http.post("/api/datasets", json=mapped).json()["format"] == "text"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"path": "../../etc/passwd"}, 403, "path-not-allowed"),
        ({"path": "none"}, 404, "dataset-not-found"),
        ({"hub_id": "../x"}, 422, "invalid-request"),
        ({"hub_id": "a/b", "token": "hf_x"}, 422, "invalid-request"),
        ({"hub_id": "a/b"}, 503, "hub-unavailable"),
        ({}, 422, "invalid-request"),
        ([], 422, "invalid-request"),
    ],
)
def test_what_cannot_be_brought_in_is_refused(studio: StudioServer, body: Any, status: int, kind: str) -> None:
    response = studio.http.post("/api/datasets", json=body)
    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{kind}"), response.text
