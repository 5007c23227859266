"""Attacks on a real server: each is refused with a stable type, writes nothing and starts no engine.

docs/hardening.md lists them all, with the tests of attacks that need more than one request.
"""

import json
import re
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.routes import every_route, new_app
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server
from tests.support.tiny_model import TINY_ID, copy_tiny_model
from tests.support.untouched import untouched

FOREIGN: dict[str, tuple[list[tuple[str, str]], int, str]] = {
    "another host": ([("Host", "evil.example")], 421, "wrong-host"),
    "a host that begins as ours": ([("Host", "127.0.0.1.evil")], 421, "wrong-host"),
    "a host that ends as ours": ([("Host", "evil.127.0.0.1.nip.io")], 421, "wrong-host"),
    "an address with a name behind it": ([("Host", "[::1]evil")], 421, "wrong-host"),
    "an empty host": ([("Host", "")], 421, "wrong-host"),
    "another origin": ([("Host", "127.0.0.1"), ("Origin", "http://evil.example")], 403, "foreign-origin"),
    "another port's origin": ([("Host", "127.0.0.1:1"), ("Origin", "http://127.0.0.1:2")], 403, "foreign-origin"),
    "no origin": ([("Host", "127.0.0.1"), ("Origin", "null")], 403, "foreign-origin"),
    "a foreign site": ([("Host", "127.0.0.1"), ("Sec-Fetch-Site", "cross-site")], 403, "foreign-origin"),
    "a foreign site's script": (
        [("Host", "127.0.0.1"), ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors")],
        403,
        "foreign-origin",
    ),
}
JSON_ROUTES = ("/api/peft/configure", "/api/datasets", "/api/training/jobs", "/v1/chat/completions", "/login")


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    return every_route(new_app(tmp_path_factory.mktemp("no-home")))


def kind_of(response: httpx.Response) -> str:
    """Return the stable type of an error, in either envelope."""
    body = response.json()
    if "error" in body:
        return str(body["error"]["code"]).replace("_", "-")
    return str(body["type"]).removeprefix("/problems/")


def raw(studio: StudioServer, *lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """Send a request as it stands here, and return the status and all that came."""
    with socket.create_connection(("127.0.0.1", studio.port), timeout=600) as connection:
        connection.sendall("\r\n".join((*lines, "Connection: close", "", "")).encode("latin-1") + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split(b" ", 2)[1]), answer


# 1 to 4: pages of others, and names that lead to this machine


@pytest.mark.parametrize("attack", FOREIGN)
def test_no_route_and_no_stream_answers_a_foreign_page(
    studio: StudioServer, routes: list[tuple[str, str]], attack: str
) -> None:
    headers, status, kind = FOREIGN[attack]
    with untouched(studio):
        for method, path in routes:
            response = studio.http.request(method, path, headers=headers)
            assert response.status_code == status, (method, path, response.text)
            assert method == "HEAD" or kind_of(response) == kind, (method, path)
            assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "lines",
    [
        ("GET /health HTTP/1.1",),
        ("GET /health HTTP/1.0",),
        ("GET /health HTTP/1.1", "Host: 127.0.0.1", "Host: 127.0.0.1"),
        ("DELETE /api/models/cache HTTP/1.1", "Host: 127.0.0.1", "Host: evil.example"),
        ("GET /api/hardware/stream HTTP/1.1", "Host: evil.example", "Host: 127.0.0.1"),
        ("GET http://evil.example/health HTTP/1.1", "Host: evil.example"),
        ("GET /health HTTP/1.1", "Host: 127.0.0.1@evil.example"),
        ("GET /health HTTP/1.1", "Host: 127.0.0.1/evil"),
    ],
)
def test_a_host_that_is_missing_doubled_or_no_host_is_refused(studio: StudioServer, lines: tuple[str, ...]) -> None:
    status, answer = raw(studio, *lines)
    assert status in (400, 421), answer


# 5, 26 to 31: bodies


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "text/json"])
def test_a_body_that_a_form_of_a_foreign_page_can_send_is_not_read(studio: StudioServer, kind: str) -> None:
    with untouched(studio):
        for path in JSON_ROUTES:
            response = studio.http.post(path, content=b"{}", headers={"Content-Type": kind})
            assert (response.status_code, kind_of(response)) == (415, "unsupported-media-type"), path


BODIES: dict[str, tuple[bytes, int]] = {
    "NaN": (b'{"a": NaN}', 422),
    "infinity": (b'{"a": -Infinity}', 422),
    "half a surrogate pair": (b'{"a": "\\ud800"}', 422),
    "nested 900 deep": (b"[" * 900 + b"]" * 900, 422),
    "nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, 422),
    "a key twice": (b'{"a": 1, "a": 2}', 422),
    "a key twice by an escape": (b'{"a": 1, "\\u0061": 2}', 422),
    "a number of 4,000 digits": (b'{"overrides": {"rank": ' + b"9" * 4000 + b"}}", 422),
    "a number of 5,000 digits": (b'{"overrides": {"rank": ' + b"9" * 5000 + b"}}", 422),
    "no JSON": (b"{'a': 1}", 422),
    "two documents": (b"{}{}", 422),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), 400),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), 422),
    "a byte-order mark": (b"\xef\xbb\xbf{}", 400),
    "broken UTF-8": (b'{"a": "\xc3("}', 400),
    "UTF-8 that is too long": (b'{"a": "\xc0\xaf"}', 400),
}


@pytest.mark.parametrize("attack", BODIES)
def test_json_that_two_parsers_would_read_differently_is_refused(studio: StudioServer, attack: str) -> None:
    body, status = BODIES[attack]
    with untouched(studio):
        for path in JSON_ROUTES:
            response = studio.http.post(path, content=body, headers={"Content-Type": "application/json"})
            said = {status, 400} if path.startswith("/v1") else {status}
            assert response.status_code in said, (path, response.text)
            assert kind_of(response) in ("invalid-json", "invalid-request") and len(response.content) < 2000


NUMBERS = ("1e999", str(2**63), "-1", '"12"', "true", "12.5", "null", "[12]", "9" * 400)


@pytest.mark.parametrize("value", NUMBERS)
def test_what_is_no_number_of_the_kind_is_refused(studio: StudioServer, value: str) -> None:
    with untouched(studio):
        for path, body in (
            ("/api/peft/configure", '{"overrides": {"rank": %s}}'),
            ("/api/models/search", '{"limit": %s}'),
            ("/api/training/jobs", '{"model_id": "tests/tiny-llama", "dataset_id": "ds_x", "priority": %s.5}'),
            (
                "/v1/chat/completions",
                '{"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": %s}',
            ),
        ):
            if value == "null" and path.startswith("/v1"):
                continue  # as if it were left out
            content = (body % value).encode()
            response = studio.http.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code in (400, 422), (path, response.text)


def test_a_body_of_100_mb_is_refused_before_it_is_read(studio: StudioServer) -> None:
    with untouched(studio):
        for path in JSON_ROUTES:
            lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
            status, answer = raw(studio, *lines, f"Content-Length: {100 * 2**20}")
            assert (status, b"too" in answer) == (413, True)


# 6, 7: tests/api/test_faults.py, tests/contracts/test_api_key.py
# 8 to 10, 38: names and paths

NAMES = (
    "../../etc/passwd",
    "a/b/c",
    "a\0b",
    "a--b",
    "a/../b",
    "a;id",
    "$(id)",
    "--help",
    "-rf/x",
    "a b/c",
    "a/b\n",
    ".",
    "..",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_models_is_refused_wherever_a_model_is_named(studio: StudioServer, name: str) -> None:
    bodies: dict[str, Any] = {
        "/api/peft/load-model": {"model_id": name},
        "/api/models/compatibility": {"model_id": name},
        "/api/training/jobs": {"model_id": name, "dataset_id": "ds_x"},
        "/api/datasets": {"hub_id": name},
        "/api/adapters": {"hub_id": name},
        "/api/adapters/none/push": {"repo_id": name},
    }
    with untouched(studio):
        for path, body in bodies.items():
            response = studio.http.post(path, json=body)
            # "a--b" is refused by what it would name; a job names its dataset first, and a push its adapter.
            assert response.status_code in (404, 422), (path, response.text)
            assert kind_of(response).endswith(("invalid-request", "-rejected", "-not-found")), (path, response.text)
        chat = {"model": name, "messages": [{"role": "user", "content": "hello"}]}
        assert studio.http.post("/v1/chat/completions", json=chat).status_code in (400, 404)


CLIMBS = (
    *("%2e%2e/%2e%2e/etc/passwd", "%252e%252e/etc/passwd", "..%2f..%2fetc%2fpasswd", "..\\..\\etc\\passwd"),
    *("%00", "../../etc/passwd"),
)
PLACES = (
    *("/api/models/", "/api/models/popular/", "/api/datasets/", "/api/adapters/", "/api/training/jobs/"),
    *("/api/exports/", "/api/exports/x/files/", "/static/x/", "/static/", "/runs/", "/datasets/", "/adapters/"),
    *("/v1/files/", "/v1/models/"),
)


@pytest.mark.parametrize("climb", CLIMBS)
def test_no_path_climbs_out_however_it_is_written(studio: StudioServer, climb: str) -> None:
    with untouched(studio):
        for place in PLACES:
            status, answer = raw(studio, f"GET {place}{climb} HTTP/1.1", "Host: 127.0.0.1")
            here = f"location: http://127.0.0.1{place}".encode()  # the same path with a slash at its end
            assert status in (400, 404, 422) or (status == 307 and here in answer), (place, answer)
            assert b"root:" not in answer


# 13, 16 to 18, 22, 23: models on this machine


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StudioServer, Path]]:
    """A server whose folder of models is full of traps."""
    models = tmp_path_factory.mktemp("traps")
    for name, trap in TRAPS.items():
        copy_tiny_model(models / name)
        trap[0](models / name)
    with start_server(tmp_path_factory.mktemp("home"), models) as server:
        yield server, models


def setting(file: str, **settings: Any) -> Any:
    def change(model: Path) -> None:
        known = json.loads((model / file).read_bytes()) if (model / file).exists() else {}
        (model / file).write_text(json.dumps(known | settings))

    return change


def weights(content: bytes | None) -> Any:
    def change(model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] if content is None else content)

    return change


def header(tensors: dict[str, Any], data: int) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def pickle_alone(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")


F32 = {"dtype": "F32", "shape": [2]}
TRAPS: dict[str, tuple[Any, int, str]] = {
    "code-of-the-model": (setting("config.json", auto_map={"AutoModel": "x.Y"}), 409, "needs-remote-code"),
    "code-within": (setting("config.json", text_config={"auto_map": {"a": "x.Y"}}), 409, "needs-remote-code"),
    "code-of-the-tokenizer": (
        setting("tokenizer_config.json", auto_map={"a": ["x.Y", None]}),
        409,
        "needs-remote-code",
    ),
    "code-of-generation": (setting("generation_config.json", auto_map={"a": "x.Y"}), 409, "needs-remote-code"),
    "code-elsewhere": (setting("processor_config.json", auto_map={"a": "x.Y"}), 409, "needs-remote-code"),
    "kernel": (setting("config.json", attn_implementation="someone/kernel"), 409, "needs-remote-code"),
    "kernel-within": (setting("config.json", _attn_implementation={"": "a/b@main"}), 409, "needs-remote-code"),
    "kernel-of-experts": (setting("config.json", experts_implementation="a/b"), 409, "needs-remote-code"),
    "layers": (setting("config.json", num_hidden_layers=10**7), 422, "model-rejected"),
    "width": (setting("config.json", hidden_size=10**12), 422, "model-rejected"),
    "negative": (setting("config.json", vocab_size=-1), 422, "model-rejected"),
    "no-header": (weights(b"\xff" * 64), 422, "model-rejected"),
    "cut": (weights(None), 422, "model-rejected"),
    "overlap": (
        weights(header({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}}, 12)),
        422,
        "model-rejected",
    ),
    "gap": (weights(header({"a": F32 | {"data_offsets": [8, 16]}}, 16)), 422, "model-rejected"),
    "pickle": (pickle_alone, 409, "no-safe-weights"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_model_that_is_a_trap_is_refused_before_any_library_reads_it(
    evil: tuple[StudioServer, Path], name: str
) -> None:
    studio, models = evil
    _, status, kind = TRAPS[name]
    with untouched(studio, models):
        response = studio.http.post("/api/peft/load-model", json={"model_id": name, "force": True})
        assert (response.status_code, kind_of(response)) == (status, kind), response.text
    assert not (models / name / "canary").exists()


@pytest.mark.parametrize("option", [{"trust_remote_code": True}, {"attn_implementation": "someone/kernel"}])
def test_code_and_kernels_cannot_be_asked_for(studio: StudioServer, option: dict[str, Any]) -> None:
    with untouched(studio):
        for path, body in (
            ("/api/peft/load-model", {"model_id": TINY_ID}),
            ("/api/models/compatibility", {"model_id": TINY_ID}),
            ("/api/training/jobs", {"model_id": TINY_ID, "dataset_id": "ds_x"}),
            ("/api/peft/configure", {}),
            ("/api/adapters", {"path": "/etc"}),
            ("/api/adapters/none/export", {"format": "merged"}),
            ("/api/datasets", {"hub_id": "a/b"}),
        ):
            response = studio.http.post(path, json=body | option)
            assert (response.status_code, kind_of(response)) == (422, "invalid-request"), (path, response.text)


# 32: uploads


@pytest.mark.parametrize("length", ["-1", "1e3", "+5", "0x10", "5, 5", str(10**30), "９"])
def test_a_length_that_is_none_is_refused(studio: StudioServer, length: str) -> None:
    with untouched(studio):
        for kind in ("application/json", "multipart/form-data; boundary=x"):
            lines = ("POST /api/datasets HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}")
            status, _ = raw(studio, *lines, f"Content-Length: {length}".encode().decode("latin-1"), body=b"{}")
            assert status in (400, 413)


def test_a_length_beside_chunks_is_refused(studio: StudioServer) -> None:
    """What a proxy in front might take for two requests."""
    lines = ("POST /api/peft/configure HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
    both = ("Content-Length: 6", "Transfer-Encoding: chunked")
    with untouched(studio):
        assert raw(studio, *lines, *both, body=b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n")[0] == 400


# 35: once


@pytest.mark.engine
def test_one_idempotency_key_50_times_at_once_is_one_job(studio: StudioServer) -> None:
    dataset = studio.upload(messages_jsonl())
    body = {
        "model_id": TINY_ID,
        "dataset_id": dataset["id"],
        "overrides": {"max_steps": 1, "max_seq_length": 64},
        "idempotency_key": "fifty",
    }
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: studio.http.post("/api/training/jobs", json=body), range(50)))
    assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers][:2]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(studio.http.get("/api/training/jobs").json()["jobs"]) == 1
    job = answers[0].json()["id"]
    studio.http.post(f"/api/training/jobs/{job}/cancel")
    studio.wait_for_state(job, "cancelled", "succeeded")


# 37: addresses


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://2130706433/",
        "http://127.0.0.1:1/x.jsonl",
        "file:///etc/passwd",
    ],
)
def test_no_route_fetches_an_address(studio: StudioServer, address: str) -> None:
    """Nothing takes a URL: what is fetched is named by a repository of the Hub that the operator chose."""
    with untouched(studio):
        for path, field in (
            *(("/api/datasets", field) for field in ("hub_id", "path", "url", "endpoint")),
            *(("/api/adapters", field) for field in ("hub_id", "path", "url", "endpoint")),
            *(("/api/peft/load-model", field) for field in ("model_id", "url", "endpoint")),
            ("/v1/files", "url"),
        ):
            response = studio.http.post(path, json={field: address})
            assert response.status_code in (400, 403, 404, 422), (path, field, response.text)
            assert "root:" not in response.text


# 39: what is logged and exported

ESCAPES = "\x1b[31mred\r\nforged: line=1"


def test_what_a_client_sends_forges_and_paints_no_line_of_the_log(studio: StudioServer) -> None:
    quoted = "".join(f"%{byte:02x}" for byte in ESCAPES.encode())
    studio.http.get(f"/api/training/jobs/{quoted}")
    studio.http.get(f"/{quoted}")
    studio.http.post("/api/datasets", files={"file": (ESCAPES, b"{}")})
    log = studio.log_path.read_bytes()
    assert b"\x1b" not in log and b"forged" in log
    assert not re.search(rb"^forged", log, re.MULTILINE)


def test_names_that_a_shell_or_a_spreadsheet_would_run_are_inert(studio: StudioServer) -> None:
    for name in (
        "$(touch canary)",
        ";touch canary",
        "`touch canary`",
        "--help",
        "=cmd|' /C calc'!A0",
        "<script>x</script>",
    ):
        dataset = studio.upload(messages_jsonl(), filename=f"{name}.jsonl", name=name)
        assert dataset["name"] == name
        shown = studio.http.get(f"/datasets/{dataset['id']}", headers={"Accept": "text/html"})
        assert shown.status_code == 200 and "<script>x" not in shown.text
        assert studio.http.delete(f"/api/datasets/{dataset['id']}").status_code == 204
    assert not list(studio.home.rglob("canary"))


# What a browser may make of an answer


def test_every_answer_tells_a_browser_to_make_nothing_of_it(
    studio: StudioServer, routes: list[tuple[str, str]]
) -> None:
    for method, path in routes:
        if method != "GET" or "stream" in path:
            continue
        headers = studio.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert headers["cross-origin-resource-policy"] == "same-origin", path
