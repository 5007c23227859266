"""Files and uploads through the unmodified `openai` package."""

import asyncio
import hashlib
import io
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.support.openai_clients import async_client_of, client_of, jsonl
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server

ROWS = messages_jsonl(6).encode()
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "utc"}'}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
ASKED, ANSWERED = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
KINDS: dict[str, dict[str, Any]] = {
    "conversation": {"messages": [ASKED, ANSWERED]},
    "weights": {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED | {"weight": 1}]},
    "tools": {
        "messages": [
            ASKED,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "9"},
            ANSWERED,
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    },
    "completion": {"prompt": "a", "completion": "b"},
    "preference": {
        "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [ANSWERED],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    },
}


def ready(client: OpenAI, file_id: str) -> Any:
    return client.files.wait_for_processing(file_id, poll_interval=0.05)


def test_a_file_goes_its_whole_way(client: OpenAI, studio: StudioServer) -> None:
    created = client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    assert (created.object, created.filename, created.bytes, created.purpose) == (
        "file", "train.jsonl", len(ROWS), "fine-tune",
    )  # fmt: skip
    assert ready(client, created.id).status == "processed"
    assert client.files.retrieve(created.id).to_dict() == created.to_dict() | {"status": "processed"}
    assert client.files.content(created.id).read() == ROWS
    dataset = studio.http.get(f"/api/datasets/ds_{created.id.removeprefix('file-')}").json()
    assert (dataset["name"], dataset["rows"], dataset["bytes"]) == ("train.jsonl", 6, len(ROWS))
    assert client.files.delete(created.id).to_dict() == {"id": created.id, "object": "file", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(created.id)
    assert studio.http.get(f"/api/datasets/{dataset['id']}").status_code == 404


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_is_read(client: OpenAI, studio: StudioServer, kind: str) -> None:
    created = client.files.create(file=("rows.jsonl", jsonl(KINDS[kind])), purpose="fine-tune")
    assert ready(client, created.id).status == "processed"
    dataset = studio.http.get(f"/api/datasets/ds_{created.id.removeprefix('file-')}").json()
    assert dataset["trainable"]
    assert all("parallel_tool_calls" in note for note in dataset["warnings"])


def test_bad_rows_are_named_by_line(client: OpenAI) -> None:
    bad = ROWS + b'{"messages": [{"role": "user"}]}\n{not json}\n'
    found = ready(client, client.files.create(file=("bad.jsonl", bad), purpose="fine-tune").id)
    assert found.status == "error"
    assert found.status_details is not None
    assert "line 7" in found.status_details and "line 8" in found.status_details
    assert client.files.content(found.id).read() == bad


def test_lists_are_paged_in_both_orders(client: OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    for order, expected in (("asc", made), ("desc", made[::-1])):
        first = client.files.list(purpose="user_data", limit=2, order=order)  # type: ignore[arg-type]
        assert [file.id for file in first.data] == expected[:2]
        assert first.has_more is True and first.to_dict()["first_id"] == expected[0]
        assert first.to_dict()["last_id"] == expected[1]
        assert [file.id for file in first] == expected
    assert client.files.list(purpose="user_data", after=made[0]).data == []
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after="file-nowhere")
    assert refused.value.param == "after"


def test_what_came_another_way_is_a_file_too(client: OpenAI, studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl(3), filename="mine.jsonl")
    file = client.files.retrieve("file-" + dataset["id"].removeprefix("ds_"))
    assert (file.filename, file.status, file.purpose) == ("mine.jsonl", "processed", "fine-tune")
    assert file.id in [each.id for each in client.files.list()]
    assert client.files.content(file.id).text == messages_jsonl(3)
    client.files.delete(file.id)
    assert studio.http.get(f"/api/datasets/{dataset['id']}").status_code == 404


def test_an_expiry_is_kept_and_bounded(client: OpenAI) -> None:
    expires = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a.txt", b"x"), purpose="user_data", expires_after=expires)  # type: ignore[arg-type]
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(
            file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 1}
        )
    assert refused.value.param == "expires_after[seconds]"


@pytest.mark.parametrize("purpose", ["batch", "assistants", "vision", "evals", "nonsense"])
def test_other_purposes_are_refused_with_the_reason(client: OpenAI, purpose: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.txt", b"x"), purpose=purpose)
    assert refused.value.param == "purpose" and refused.value.code == "purpose_not_here"


def test_errors_have_openais_form_everywhere(studio: StudioServer, client: OpenAI) -> None:
    for method, path, status in (
        ("GET", "/v1/nowhere", 404),
        ("GET", "/v1", 404),
        ("PUT", "/v1/files", 405),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/files/file-none", 404),
        ("GET", "/v1/fine_tuning/jobs/ftjob-none", 404),
        ("POST", "/v1/fine_tuning/jobs", 400),
        ("POST", "/v1/uploads/upload_none/cancel", 404),
        ("POST", "/v1/files", 400),
    ):
        response = studio.http.request(method, path, json={} if method == "POST" else None)
        assert response.status_code == status, (path, response.text)
        assert set(response.json()) == {"error"} and set(response.json()["error"]) == {
            "message",
            "type",
            "param",
            "code",
        }
        assert response.headers["x-request-id"] and response.headers["content-type"] == "application/json"
    raw = studio.http.post("/v1/uploads", content=b"{nope", headers={"Content-Type": "application/json"})
    assert raw.status_code == 400 and raw.json()["error"]["code"] == "invalid_json"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.files.retrieve("file-none")
    assert unknown.value.request_id and unknown.value.code == "file_not_found"


def test_a_key_is_asked_for_in_openais_form(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs, PEFT_STUDIO_API_KEY="sesame") as studio:
        with pytest.raises(openai.AuthenticationError) as refused:
            client_of(studio).files.list()
        assert refused.value.code == "invalid_api_key"
        assert client_of(studio).with_options(api_key="sesame").files.list().data == []


def test_an_upload_in_parts(client: OpenAI) -> None:
    content = ROWS * 3
    thirds = [content[:300], content[300:301], content[301:]]
    upload = client.uploads.create(
        bytes=len(content), filename="parts.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert upload.status == "pending" and upload.file is None
    ids = [client.uploads.parts.create(upload.id, data=part).id for part in reversed(thirds)][::-1]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.uploads.complete(upload.id, part_ids=ids[::-1], md5=hashlib.md5(content).hexdigest())
    assert wrong.value.code == "upload_incomplete" and "md5" in str(wrong.value)
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=ids[:2])
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[*ids, "part_none"])
    done = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(content).hexdigest())
    assert done.status == "completed" and done.file is not None and done.file.bytes == len(content)
    again = client.uploads.complete(upload.id, part_ids=ids)
    assert again.file is not None and again.file.id == done.file.id
    assert ready(client, done.file.id).status == "processed"
    assert client.files.content(done.file.id).read() == content
    with pytest.raises(openai.BadRequestError) as ended:
        client.uploads.cancel(upload.id)
    assert ended.value.response.headers["x-should-retry"] == "false"


def test_the_sdks_own_chunks(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(ROWS * 10)
    done = client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=500)
    assert done.file is not None and client.files.content(done.file.id).read() == ROWS * 10
    held = client.uploads.upload_file_chunked(
        file=io.BytesIO(ROWS).getvalue(), filename="b.jsonl", bytes=len(ROWS), mime_type="x/y", purpose="user_data"
    )
    assert held.file is not None and held.file.filename == "b.jsonl"


def test_an_upload_goes_on_after_a_restart_and_can_be_cancelled(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs) as studio:
        client = client_of(studio)
        upload = client.uploads.create(bytes=len(ROWS), filename="p.jsonl", mime_type="x/y", purpose="fine-tune")
        other = client.uploads.create(bytes=5, filename="q.txt", mime_type="x/y", purpose="user_data")
        first = client.uploads.parts.create(upload.id, data=ROWS[:50])
        studio.kill()
        studio.start()
        second = client.uploads.parts.create(upload.id, data=ROWS[50:])
        done = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
        assert done.file is not None and ready(client, done.file.id).status == "processed"
        assert client.uploads.cancel(other.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            client.uploads.parts.create(other.id, data=b"12345")
        with pytest.raises(openai.APIStatusError) as large:
            client.uploads.create(bytes=10**15, filename="q", mime_type="x/y", purpose="user_data")
        assert large.value.status_code == 413


def test_a_file_that_was_not_read_before_the_server_died_is_read_by_the_next(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs) as studio:
        client = client_of(studio)
        many = messages_jsonl(60_000).encode()
        form = {"purpose": "fine-tune"}
        with pytest.raises(httpx.TransportError):
            # The answer is not waited for: the file is read meanwhile.
            studio.http.post(
                "/v1/files", files={"file": ("m.jsonl", many)}, data=form, timeout=httpx.Timeout(60, read=0.3)
            )
        studio.kill()
        studio.start()
        found = [file for file in client.files.list() if file.filename == "m.jsonl"]
        assert len(found) == 1 and ready(client, found[0].id).status == "processed"
        assert client.files.content(found[0].id).read() == many


def test_the_async_client(studio: StudioServer) -> None:
    async def scenario() -> None:
        async with async_client_of(studio) as client:
            created = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
            assert (await client.files.wait_for_processing(created.id, poll_interval=0.05)).status == "processed"
            assert (await client.files.list(limit=1)).data[0].id == created.id
            assert (await client.files.content(created.id)).content == ROWS
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve("file-none")
            assert (await client.files.delete(created.id)).deleted

    asyncio.run(scenario())
