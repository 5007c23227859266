"""Every refusal is a problem document with a stable type; nothing is echoed and nothing crashes."""

import re
from importlib import import_module
from typing import Any

import pytest

import main  # noqa: F401 - it imports every module that defines an error
from api.problems import STATUS, status_of
from core import errors
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID


def _subclasses(kind: type[errors.StudioError]) -> set[type[errors.StudioError]]:
    return {kind}.union(*(_subclasses(child) for child in kind.__subclasses__()))


def test_every_error_has_a_status_a_slug_and_a_title_of_its_own() -> None:
    kinds = _subclasses(errors.StudioError)
    assert all(400 <= status_of(kind("x")) < 600 for kind in kinds)
    assert len({kind.slug for kind in kinds}) == len(kinds)
    assert set(STATUS) <= kinds


# A line of the tree: its bars, a name, the status of a branch, the module of an error that is defined elsewhere.
_DRAWN = re.compile(
    r"^    ([│├└─ ]*)([A-Z]\w+)(?:  (\d{3}))?(?: +([a-z]+(?:\.[a-z_]+)+))?(?: +the base.*)?$", re.MULTILINE
)


def test_the_tree_of_errors_has_each_below_its_branch_with_its_module_and_status() -> None:
    drawn: set[type[errors.StudioError]] = set()
    branch = ""
    for bars, name, status, module in _DRAWN.findall(errors.__doc__ or ""):
        branch = name if status else branch
        kind = getattr(import_module(module or "core.errors"), name)
        parent = {0: "Exception", 4: "StudioError"}.get(len(bars), branch)
        assert (kind.__module__, kind.__base__.__name__) == (module or "core.errors", parent)
        assert (STATUS.get(kind) == int(status)) if status else kind not in STATUS
        assert kind.__doc__
        drawn.add(kind)
    assert drawn == _subclasses(errors.StudioError)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("POST", "/api/peft/load-model", {"model_id": "nobody/nothing"}, 503, "hub-unavailable"),
        ("POST", "/api/peft/load-model", {"model_id": TINY_ID, "algorithm": "lorra"}, 422, "invalid-request"),
        ("POST", "/api/peft/load-model", {"model_id": TINY_ID, "trust_remote_code": True}, 422, "invalid-request"),
        ("POST", "/api/peft/load-model", {"model_id": TINY_ID, "engine": "unsloth"}, 422, "setting-rejected"),
        ("POST", "/api/peft/load-model", {"model_id": TINY_ID, "device": 0}, 422, "setting-rejected"),
        ("POST", "/api/peft/load-model", {"model_id": TINY_ID, "wait_s": "5"}, 422, "invalid-request"),
        ("POST", "/api/peft/load-model", {"model_id": "../../etc/passwd"}, 422, "invalid-request"),
        ("POST", "/api/peft/load-model", {"model_id": "a/b/c"}, 422, "invalid-request"),
        ("POST", "/api/peft/configure", {"overrides": {"rnak": 4}}, 422, "invalid-request"),
        ("POST", "/api/peft/configure", {"overrides": {"checkpoint_every_steps": 0}}, 422, "invalid-request"),
        ("POST", "/api/peft/configure", {"overrides": {"precision": "fp16"}}, 422, "setting-rejected"),
        (
            "POST",
            "/api/peft/configure",
            {"algorithm": "pissa", "overrides": {"quantization": "int8"}},
            422,
            "setting-rejected",
        ),
        ("POST", "/api/training/jobs", {"model_id": TINY_ID, "dataset_id": "ds_x"}, 404, "dataset-not-found"),
        ("POST", "/api/training/jobs", {"dataset_id": "ds_x"}, 422, "setting-rejected"),
        ("POST", "/api/training/jobs", {"loaded_model_id": "mdl_x", "dataset_id": "d"}, 404, "loaded-model-not-found"),
        ("GET", "/api/training/jobs/none", None, 404, "job-not-found"),
        ("GET", "/api/training/jobs/none/checkpoints", None, 404, "job-not-found"),
        ("POST", "/api/training/jobs/none/pause", None, 404, "job-not-found"),
        ("POST", "/api/training/jobs/none/checkpoint", None, 404, "job-not-found"),
        ("GET", "/api/training/jobs/none/events", None, 404, "job-not-found"),
        ("GET", "/api/training/jobs/none/events?format=json", None, 404, "job-not-found"),
        ("POST", "/api/datasets/imports/none/cancel", None, 404, "import-not-found"),
        ("GET", "/api/adapters/none/download", None, 404, "adapter-not-found"),
        ("POST", "/api/adapters", {"path": "/etc"}, 403, "path-not-allowed"),
        ("POST", "/api/adapters", {"path": "/etc", "trust_remote_code": True}, 422, "invalid-request"),
        ("POST", "/api/adapters/none/export", {"format": "merged"}, 404, "adapter-not-found"),
        ("POST", "/api/adapters/none/export", {"format": "onnx"}, 422, "invalid-request"),
        ("POST", "/api/adapters/none/export", {"format": "merged", "trust_remote_code": True}, 422, "invalid-request"),
        ("POST", "/api/adapters/none/push", {"repo_id": "me/x"}, 404, "adapter-not-found"),
        ("POST", "/api/adapters/none/push", {"repo_id": "../x"}, 422, "invalid-request"),
        ("POST", "/api/adapters/none/push", {"repo_id": "me/x", "token": "hf_x"}, 422, "invalid-request"),
        ("GET", "/api/exports/none", None, 404, "export-not-found"),
        ("GET", "/api/exports/none/download", None, 404, "export-not-found"),
        ("GET", "/api/exports/none/files/x", None, 404, "export-not-found"),
        ("POST", "/api/exports/none/cancel", None, 404, "export-not-found"),
        ("DELETE", "/api/exports/none", None, 404, "export-not-found"),
        ("GET", "/api/datasets/none", None, 404, "dataset-not-found"),
        ("GET", "/api/models/popular/cooking", None, 404, "task-not-found"),
        ("GET", "/api/models/a/b/c", None, 422, "model-rejected"),
        ("GET", "/api/hardware/stream?interval_s=0", None, 422, "invalid-request"),
        ("DELETE", "/api/peft/loaded-models/none", None, 404, "loaded-model-not-found"),
        ("PUT", "/api/peft/algorithms", None, 405, "method-not-allowed"),
        ("GET", "/nowhere", None, 404, "not-found"),
    ],
)
def test_a_refusal_is_a_problem_document(
    studio: StudioServer, method: str, path: str, body: Any, status: int, kind: str
) -> None:
    response = studio.http.request(method, path, json=body)
    assert response.headers["content-type"] == "application/problem+json", response.text
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"/problems/{kind}")
    assert problem["status"] == status and problem["title"] and problem["detail"]
    assert problem["instance"] == path.partition("?")[0]
    assert studio.engines() == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b'{"overrides": {"learning_rate": NaN}}', 422),
        (b'{"overrides": {"learning_rate": 1e999}}', 422),
        (b'{"overrides": {"rank": ' + b"9" * 4000 + b"}}", 422),
        (b'{"model_id": "\\ud800/x"}', 422),
        (b"[" * 900 + b"]" * 900, 422),
        (b'{"algorithm": ', 422),
        (b'{"algorithm": "lora", "algorithm": "dora"}', 422),
        (b'\xef\xbb\xbf{"algorithm": "lora"}', 400),
        (b"\xff\xfe{\x00}\x00", 400),
    ],
)
def test_hostile_json_is_refused_without_being_echoed(studio: StudioServer, raw: bytes, status: int) -> None:
    response = studio.http.post("/api/peft/configure", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil"}, 421),
        ({"Host": "[::1]evil"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "localhost"}, 200),
    ],
)
def test_a_web_page_cannot_drive_the_server(studio: StudioServer, headers: dict[str, str], status: int) -> None:
    response = studio.http.get("/api/peft/use-cases", headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


_VISIT = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize("path", ["/", "/runs", "/models/tests/tiny-llama", "/docs", "/login"])
def test_a_link_of_another_site_leads_to_a_page_and_nothing_else(studio: StudioServer, path: str) -> None:
    assert studio.http.get(path, headers=_VISIT).is_success or path == "/login"
    embedded = (
        {"Sec-Fetch-Dest": "iframe"},
        {"Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
        {"Sec-Fetch-Dest": "script"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    )
    for changed in embedded:
        assert studio.http.get(path, headers=_VISIT | changed).status_code == 403, changed
    for method in ("POST", "DELETE", "PUT", "OPTIONS"):
        assert studio.http.request(method, path, headers=_VISIT).status_code == 403, method


def test_a_link_of_another_site_leads_to_no_route_of_the_api(studio: StudioServer) -> None:
    paths = studio.http.get("/openapi.json").json()["paths"]
    assert len(paths) > 50
    curves = ["/runs/compare/curves?id=x", "/runs/x/curves"]
    others = ["/home/stream", "/home/pip_the_parrot.jsonl", "/openapi.json", "/static/x/app.js", "/nothing"]
    for path in [*paths, *curves, *others]:
        for url in (path, re.sub(r"\{[a-z_]+\}", "x", path)):
            assert studio.http.get(url, headers=_VISIT).status_code == 403, url


def test_only_json_is_taken_on_json_routes(studio: StudioServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = studio.http.post("/api/peft/configure", content=b"{}", headers={"Content-Type": kind})
        assert response.status_code == 415
    big = studio.http.post(
        "/api/peft/configure", content=b" " * (5 * 2**20), headers={"Content-Type": "application/json"}
    )
    assert big.status_code == 413
