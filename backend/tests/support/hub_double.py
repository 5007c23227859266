"""The Hugging Face Hub on 127.0.0.1: a real HTTP server with the Hub's routes, headers and bad days.

`with HubDouble() as hub: hub.add_model("org/name", {"config.json": b"{}"})`, then point a client at `hub.url`.
Also here, because the same tests want them: `ManualClock`, `safetensors_bytes` and `quiet_environment`.
"""

import hashlib
import json
import math
import threading
from base64 import b64decode, urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import pytest

RATE_LIMITED = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
_SORT_KEYS = ("downloads", "likes", "trendingScore", "createdAt", "lastModified")
_SHORT = ("_id", "id", "likes", "private", "downloads", "tags", "pipeline_tag", "library_name", "createdAt", "modelId")
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
Route = Literal[
    "list",
    "info",
    "tree",
    "resolve",
    "cdn",
    "whoami",
    "other",
    "create",
    "yaml",
    "preupload",
    "lfs",
    "upload",
    "commit",
]


class ManualClock:
    """A clock that only tests move; sleeping moves it too, and is remembered."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        self.elapsed_s = 1000.0
        self.slept_s: list[float] = []

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.elapsed_s

    def advance(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)
        self.elapsed_s += seconds

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.advance(seconds)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a route.

    `cut`: the connection ends half-way; `short`: half the body under its own length; `long`: a byte more than there
    is; `flip`: one bit differs; `hang`: nothing is sent until `release`; `stall`: half the body, and the rest after
    `release`; `drip`: the same, a byte at a time; `status`: an error with headers and body.
    """

    kind: Literal["status", "cut", "short", "long", "flip", "hang", "stall", "drip"]
    times: int
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"error":"as told"}'


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    route: Route
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes = b""


@dataclass
class _Repo:
    info: dict[str, Any]
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)
    tree: list[dict[str, Any]] | None = None


class HubDouble:
    """The server. `tokens` are valid, `requests` counts by route, `seen` keeps every request."""

    def __init__(self) -> None:
        self.tokens = {"hf_valid"}
        self.tree_page = 1000
        self.stalled = threading.Event()
        self.requests: Counter[str] = Counter()
        self.seen: list[Seen] = []
        self._recorded: dict[str, Reply] = {}
        self._repos: dict[str, _Repo] = {}
        self._renamed: dict[str, str] = {}
        self._uploaded: dict[str, bytes] = {}
        self._faults: dict[Route, list[Fault]] = {}
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add_model(
        self,
        model_id: str,
        files: dict[str, bytes],
        *,
        revision: str = "main",
        granted: tuple[str, ...] = (),
        **info: Any,
    ) -> str:
        """Add a repository, or a commit to it; `info` is put on the wire as it is. Returns the commit."""
        repo = self._repos.setdefault(model_id, _Repo({}))
        number = len(self._repos)
        defaults: dict[str, Any] = {
            "_id": f"{number:024x}",
            "id": model_id,
            "modelId": model_id,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "trendingScore": 0,
            "tags": [],
            "createdAt": f"2024-01-{number % 28 + 1:02d}T00:00:00.000Z",
            "lastModified": f"2025-01-{number % 28 + 1:02d}T00:00:00.000Z",
        }
        if "/" in model_id:
            defaults["author"] = model_id.split("/")[0]
        repo.info = defaults | repo.info | info
        repo.granted |= set(granted)
        content = b"".join(f"{name}\0{len(data)}\0".encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content + model_id.encode()).hexdigest()
        repo.commits[commit], repo.refs[revision] = dict(files), commit
        return commit

    def replay(self, path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Answer a path as the real Hub once did."""
        ours = {"content-length", "date", "connection", "transfer-encoding", "content-encoding"}
        self._recorded[path] = Reply(status, body, {k: v for k, v in headers.items() if k.lower() not in ours})

    def lie_about_tree(self, model_id: str, *entries: dict[str, Any]) -> None:
        """List what no repository can hold beside the repository's files."""
        self._repos[model_id].tree = list(entries)

    def revoke(self, token: str) -> None:
        """Refuse a token from now on."""
        self.tokens.discard(token)

    def add_dataset(self, dataset_id: str, files: dict[str, bytes], **more: Any) -> str:
        """Add a repository of data, or a commit to it; as `add_model`."""
        return self.add_model(f"datasets/{dataset_id}", files, **{"id": dataset_id, "author": "someone"} | more)

    def rename(self, old: str, new: str) -> None:
        """Answer the old id with a 307 to the new one."""
        self._renamed[old] = new

    def fail(self, route: Route, kind: Any = "status", times: int = 1, **more: Any) -> None:
        """Misbehave at the route's next requests, after the faults already told."""
        if kind in ("hang", "stall"):
            self._released.clear()
            self.stalled.clear()
        self._faults.setdefault(route, []).append(Fault(kind, times, **more))

    def recover(self) -> None:
        """Forget the faults that have not happened yet."""
        self._faults.clear()

    def release(self) -> None:
        """Let hanging and stalled requests go on."""
        self._released.set()

    def fault(self, route: Route) -> Fault | None:
        with self._lock:
            faults = self._faults.get(route, [])
            while faults and faults[0].times == 0:
                faults.pop(0)
            if not faults:
                return None
            faults[0].times -= 1
            return faults[0]

    def wait_released(self) -> None:
        self._released.wait()

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.requests[seen.route] += 1
            self.seen.append(seen)

    def answer(self, seen: Seen) -> Reply:
        if seen.path in self._recorded:
            return replace(self._recorded[seen.path], headers=dict(self._recorded[seen.path].headers))
        token = seen.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if seen.route not in ("cdn", "upload") and token is not None and token not in self.tokens:
            return _error(401, None, "Invalid credentials in Authorization header")
        parts = [unquote(part) for part in seen.path.strip("/").split("/")]
        if seen.route == "whoami":
            return _json({"name": "someone", "type": "user"}) if token else _error(401, None, "Unauthorized")
        if seen.route == "other":
            return _error(404, None, "Sorry, we can't find the page you are looking for.")
        if seen.route == "list":
            return self._list(seen)
        if seen.route in ("create", "yaml", "preupload", "lfs", "upload", "commit"):
            return self._receive(seen, token, parts)
        if seen.route == "cdn":
            return _ranged(self._blob(parts[1]), seen, {})
        return self._of_repository(seen, token, parts)

    def _of_repository(self, seen: Seen, token: str | None, parts: list[str]) -> Reply:
        name_at = (parts[2:] if parts[1] == "models" else parts[1:]) if parts[0] == "api" else parts
        marks = [i for i, part in enumerate(name_at) if part in ("revision", "tree", "resolve")]
        model_id, rest = "/".join(name_at[: marks[0]] if marks else name_at), name_at[marks[0] + 1 :] if marks else []
        if model_id in self._renamed:
            return Reply(307, headers={"Location": seen.path.replace(model_id, self._renamed[model_id], 1)})
        repo = self._repos.get(model_id)
        if repo is None or (repo.info["private"] and token is None):
            # The real Hub sends no code with the 401; over plain http its client needs one to tell it from a bad token.
            return _error(401 if token is None else 404, "RepoNotFound", "Repository not found")
        commit = repo.refs.get(rest[0] if rest else "main", rest[0] if rest else "")
        if commit not in repo.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {rest[0] if rest else 'main'}")
        if seen.route == "info":
            return self._info(repo, commit, seen)
        if repo.info["disabled"]:
            return _error(403, None, "Access to this resource is disabled.")
        if repo.info["gated"] and token not in repo.granted:
            return _error(401 if token is None else 403, "GatedRepo", f"Access to model {model_id} is restricted.")
        return (
            self._tree(repo, commit, seen)
            if seen.route == "tree"
            else self._resolve(repo, commit, "/".join(rest[1:]), seen)
        )

    # Receiving commits; everybody owns `me`, nobody anything else

    def files(self, model_id: str) -> dict[str, bytes]:
        """Return what is on a repository's main branch."""
        repo = self._repos[model_id]
        return dict(repo.commits[repo.refs["main"]])

    def commits(self, model_id: str) -> int:
        """Count a repository's commits; 0 where there is none."""
        return len(self._repos[model_id].commits) if model_id in self._repos else 0

    def is_private(self, model_id: str) -> bool:
        return bool(self._repos[model_id].info["private"])

    def _receive(self, seen: Seen, token: str | None, parts: list[str]) -> Reply:
        if seen.route == "upload":
            return self._take(parts[1], seen.body)
        if token is None:
            return _error(401, None, "Unauthorized")
        if seen.route == "yaml":
            content = json.loads(seen.body)["content"]
            bad = content.startswith("---") and "{" in content.partition("\n---")[0]
            return _json(
                {"errors": [{"message": "bad metadata"}] if bad else [], "warnings": []}, status=400 if bad else 200
            )
        if seen.route == "create":
            wanted = json.loads(seen.body)
            return self._create(f"{wanted.get('organization') or 'me'}/{wanted['name']}", wanted)
        model_id = "/".join(parts[2:4]) if parts[0] == "api" else f"{parts[0]}/{parts[1].removesuffix('.git')}"
        if model_id not in self._repos:
            return _error(404, "RepoNotFound", "Repository not found")
        if not model_id.startswith("me/"):
            return _error(403, None, "You don't have the rights to write to this repository")
        if seen.route == "preupload":
            return self._modes(model_id, json.loads(seen.body))
        return self._batch(json.loads(seen.body)) if seen.route == "lfs" else self._commit(model_id, seen.body)

    def _create(self, model_id: str, wanted: dict[str, Any]) -> Reply:
        if not model_id.startswith("me/"):
            return _error(403, None, "You don't have the rights to create a model under this namespace")
        if model_id in self._repos:
            return _error(409, None, "You already created this model repo")
        self.add_model(model_id, {}, private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        return _json({"url": f"{self.url}/{model_id}", "name": model_id})

    def _modes(self, model_id: str, wanted: dict[str, Any]) -> Reply:
        here = self.files(model_id)
        files = []
        for file in wanted["files"]:
            name, large = file["path"], _is_large(file["path"])
            old = here.get(name)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_oid(old)
            files.append({"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return _json({"files": files})

    def _batch(self, wanted: dict[str, Any]) -> Reply:
        objects = []
        for entry in wanted["objects"]:
            upload = {"href": f"{self.url}/upload/{entry['oid']}"}
            actions = {} if entry["oid"] in self._uploaded else {"actions": {"upload": upload}}
            objects.append({"oid": entry["oid"], "size": entry["size"]} | actions)
        return _json({"transfer": "basic", "objects": objects})

    def _take(self, sha256: str, body: bytes) -> Reply:
        if hashlib.sha256(body).hexdigest() != sha256:
            return _error(400, None, "XAmzContentSHA256Mismatch")
        self._uploaded[sha256] = body
        return Reply(200)

    def _commit(self, model_id: str, body: bytes) -> Reply:
        files = self.files(model_id)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self._uploaded[value["oid"]]
        commit = self.add_model(model_id, files)
        url = f"{self.url}/{model_id}/commit/{commit}"
        return _json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _list(self, seen: Seen) -> Reply:
        query = {name: values[0] for name, values in seen.query.items()}
        filters = seen.query.get("filter", [])
        found = [
            {"sha": repo.refs.get("main")} | repo.info
            for repo in self._repos.values()
            if _listed(repo.info, query, filters)
        ]
        key = query.get("sort", "trendingScore")
        if key not in _SORT_KEYS:
            return _error(400, None, f"Invalid sort parameter: {key}")
        found.sort(key=lambda info: (info.get(key) or 0, info["id"]), reverse=True)
        try:
            start = int(urlsafe_b64decode(query["cursor"])) if "cursor" in query else 0
        except ValueError:
            return _error(400, None, "Invalid cursor")
        end = start + int(query.get("limit", "1000"))
        keys = ("_id", "id", *seen.query["expand"]) if "expand" in seen.query else _SHORT
        page = [{name: info[name] for name in keys if name in info} for info in found[start:end]]
        headers = {}
        if end < len(found):
            again = seen.query | {"cursor": [urlsafe_b64encode(str(end).encode()).decode()]}
            headers["Link"] = f'<{self.url}/api/models?{urlencode(again, doseq=True)}>; rel="next"'
        return _json(page, headers)

    def _info(self, repo: _Repo, commit: str, seen: Seen) -> Reply:
        files = [_sibling(name, data, blobs="blobs" in seen.query) for name, data in repo.commits[commit].items()]
        return _json({**repo.info, "sha": commit, "siblings": repo.info.get("siblings", files)})

    def _tree(self, repo: _Repo, commit: str, seen: Seen) -> Reply:
        entries = list(repo.tree or [])
        for name, data in sorted(repo.commits[commit].items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "oid": _git_oid(data), "size": len(data)}
            if _is_large(name):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        start = int(urlsafe_b64decode(seen.query["cursor"][0])) if "cursor" in seen.query else 0
        end = start + self.tree_page
        headers = {}
        if end < len(entries):
            again = seen.query | {"cursor": [urlsafe_b64encode(str(end).encode()).decode()]}
            headers["Link"] = f'<{self.url}{seen.path}?{urlencode(again, doseq=True)}>; rel="next"'
        return _json(entries[start:end], headers)

    def _resolve(self, repo: _Repo, commit: str, name: str, seen: Seen) -> Reply:
        data = repo.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if data is None:
            reply = _error(404, "EntryNotFound", "Entry not found")
            reply.headers |= headers
            return reply
        if not _is_large(name):
            return _ranged(data, seen, headers | {"ETag": f'"{_git_oid(data)}"'})
        sha256 = hashlib.sha256(data).hexdigest()
        # Another host name of the same server: a client must not carry its token across.
        location = f"http://localhost:{self._server.server_port}/cdn/{sha256}"
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"', "ETag": f'"{_git_oid(data)}"'}
        return Reply(302, headers=headers | linked | {"Location": location})

    def _blob(self, sha256: str) -> bytes:
        blobs = (data for repo in self._repos.values() for files in repo.commits.values() for data in files.values())
        return next(data for data in blobs if hashlib.sha256(data).hexdigest() == sha256)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubDouble

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        seen = Seen(_route(url.path), self.command, url.path, parse_qs(url.query), self.headers, self._body())
        self.hub.note(seen)
        fault = self.hub.fault(seen.route)
        if fault is not None and fault.kind == "hang":
            self.hub.wait_released()
            self.close_connection = True
            return
        reply = self.hub.answer(seen)
        if fault is not None and fault.kind == "status":
            reply = Reply(fault.status, fault.body, dict(fault.headers))
        elif fault is not None and fault.kind == "short":
            reply.body = reply.body[: len(reply.body) // 2]
        elif fault is not None and fault.kind == "long":
            reply.body += b"x"
        elif fault is not None and fault.kind == "flip":
            reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1])
        if reply.headers.get("ETag", "") == self.headers.get("If-None-Match"):
            reply.status, reply.body = 304, b""
        self._send(reply, fault.kind if fault is not None else None)

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, reply: Reply, fault: str | None) -> None:
        self.send_response_only(reply.status)
        self.send_header("Date", reply.headers.pop("Date", self.date_time_string()))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(reply.body) // 2
        with suppress(ConnectionError):  # the client has gone, as it may
            if fault == "drip":
                for place, byte in enumerate(reply.body):
                    if place == half:
                        self.hub.wait_released()
                    self.wfile.write(bytes([byte]))
            else:
                self.wfile.write(reply.body[:half] if fault in ("cut", "stall") else reply.body)
            if fault == "stall":
                self.hub.stalled.set()
                self.hub.wait_released()
                self.wfile.write(reply.body[half:])
        self.close_connection = self.close_connection or fault == "cut"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep test output quiet."""


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return a valid file of zeros: name → (dtype, shape)."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * _WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(position)


def quiet_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Leave no token, proxy, offline mode or cache of the machine to huggingface_hub."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def _route(path: str) -> Route:
    parts = path.strip("/").split("/")
    if parts[0] in ("cdn", "upload"):
        return "cdn" if parts[0] == "cdn" else "upload"
    if parts[0] != "api":
        return "lfs" if "lfs" in parts else "resolve"
    if parts[1:] in (["repos", "create"], ["validate-yaml"]):
        return "create" if parts[1] == "repos" else "yaml"
    if "preupload" in parts or "commit" in parts:
        return "preupload" if "preupload" in parts else "commit"
    if parts[1] == "whoami-v2":
        return "whoami"
    if parts[1] not in ("models", "datasets") or parts[1:] == ["datasets"]:
        return "other"
    return "list" if len(parts) == 2 else "tree" if "tree" in parts else "info"


def _json(body: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Reply:
    encoded = json.dumps(body).encode()
    etag = f'W/"{len(encoded):x}-{hashlib.sha1(encoded).hexdigest()[:27]}"'
    return Reply(status, encoded, {"Content-Type": "application/json; charset=utf-8", "ETag": etag, **(headers or {})})


def _error(status: int, code: str | None, message: str) -> Reply:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Reply(status, json.dumps({"error": message or HTTPStatus(status).phrase}).encode(), headers)


def _ranged(data: bytes, seen: Seen, headers: dict[str, str]) -> Reply:
    wanted = seen.headers.get("Range", "").removeprefix("bytes=")
    if not wanted:
        return Reply(200, data, headers)
    first, _, last = wanted.partition("-")
    begin, end = int(first), min(int(last) + 1 if last else len(data), len(data))
    if begin >= len(data):
        return Reply(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})


def _listed(info: dict[str, Any], query: dict[str, str], filters: list[str]) -> bool:
    tags = {*info["tags"], info.get("library_name"), info.get("pipeline_tag")}
    total = (info.get("safetensors") or {}).get("total")
    bounds = dict(part.split(":") for part in query.get("num_parameters", "").split(",") if part)
    return (
        not info["private"]
        and set(filters) <= tags
        and query.get("search", "").lower() in info["id"].lower()
        and query.get("author") in (None, info.get("author"))
        and query.get("pipeline_tag") in (None, info.get("pipeline_tag"))
        and query.get("gated") in (None, str(bool(info["gated"])).lower())
        and (not bounds or total is not None)
        and (total or 0) >= _number(bounds.get("min", "0"))
        and (total or 0) <= _number(bounds.get("max", "1000000T"))
    )


def _number(words: str) -> float:
    return float(words[:-1]) * _UNITS[words[-1]] if words[-1] in _UNITS else float(words)


def _sibling(name: str, data: bytes, *, blobs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name}
    if blobs:
        entry |= {"size": len(data), "blobId": _git_oid(data)}
        if _is_large(name):
            entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return entry


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf", ".parquet"))


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
