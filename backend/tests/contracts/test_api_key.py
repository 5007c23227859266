"""With a key set, only /health is open."""

import re
from http.cookies import SimpleCookie
from pathlib import Path

import httpx
import psutil

from tests.support.routes import every_route, new_app
from tests.support.server import StudioServer, start_server

_OPEN = ("/health", "/login", "/static/")


def _log_in(studio: StudioServer, routes: list[tuple[str, str]]) -> None:
    """A login is a cookie that scripts cannot read; with it alone nothing is changed."""
    assert studio.http.post("/login", json={"key": "wrong"}).status_code == 401
    begun = studio.http.post("/login", json={"key": "sesame-canary"})
    (cookie,) = SimpleCookie(begun.headers["set-cookie"]).values()
    assert cookie["httponly"] and cookie["samesite"] == "strict"
    assert "sesame-canary" not in cookie.value
    studio.http.cookies.clear()
    session = {"Cookie": f"{cookie.key}={cookie.value}"}
    page = studio.http.get("/runs", headers=session)
    assert page.status_code == 200
    found = re.search(r'<meta name="csrf" content="([0-9a-f]+)">', page.text)
    assert found is not None
    bad = {"Cookie": f"{cookie.key}={cookie.value[:-1]}x"}
    assert studio.http.get("/api/training/jobs", headers=session).status_code == 200
    assert studio.http.get("/api/training/jobs", headers=bad).status_code == 401
    assert studio.http.get("/api/training/jobs", headers=session | {"Authorization": "Bearer wrong"}).status_code == 401
    for method, path in routes:
        if method not in ("GET", "HEAD") and not path.startswith(_OPEN):
            assert studio.http.request(method, path, headers=session).status_code == 403, (method, path)
    assert studio.http.delete("/api/models/cache", headers=session | {"X-CSRF-Token": "0" * 64}).status_code == 403
    token = {"X-CSRF-Token": found.group(1)}
    assert studio.http.delete("/api/models/cache", headers=token).status_code == 401
    assert studio.http.delete("/api/models/cache", headers=session | token).status_code == 204
    ended = studio.http.post("/logout", headers=session | token)
    assert f'{cookie.key}=""' in ended.headers["set-cookie"]
    studio.http.cookies.clear()


def _never_says_the_key(studio: StudioServer) -> None:
    """Have every answer from now on looked through."""

    def look(response: httpx.Response) -> None:
        response.read()
        assert b"sesame-canary" not in response.content, response.request.url
        assert "sesame-canary" not in repr(response.headers), response.request.url

    studio.http.event_hooks["response"].append(look)


def test_every_route_but_health_wants_the_key(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs, PEFT_STUDIO_API_KEY="sesame-canary") as studio:
        _never_says_the_key(studio)
        assert studio.http.get("/health").status_code == 200
        key = {"Authorization": "Bearer sesame-canary"}
        routes = every_route(new_app(tmp_path / "no-home"))
        documented = studio.http.get("/openapi.json", headers=key).json()["paths"]
        assert {re.sub(r"\{[a-z_]+\}", "x", path) for path in documented} <= {path for _, path in routes}
        for method, path in routes:
            if path.startswith(_OPEN):
                continue
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame-canary"}):
                assert studio.http.request(method, path, headers=headers).status_code == 401, (method, path)
            if method == "GET" and "stream" not in path:
                assert studio.http.get(path, headers=key).status_code not in (401, 403, 500), path
        assert studio.http.get("/docs").status_code == 401
        for page in ("/", "/runs", "/new", "/home/stream", "/docs"):
            asked = studio.http.get(page, headers={"Accept": "text/html"})
            assert (asked.status_code, asked.headers["location"]) == (303, f"/login?next={page}")
        deep = studio.http.get("/playground?model=a/b&blind=1", headers={"Accept": "text/html"})
        assert deep.headers["location"] == "/login?next=/playground%3Fmodel%3Da/b%26blind%3D1"
        _log_in(studio, routes)
        assert studio.http.get("/api/peft/use-cases", headers=key).status_code == 200
        assert "sesame-canary" not in " ".join(psutil.Process(studio.pid).cmdline())
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"sesame-canary" in path.read_bytes()]
    assert not kept  # the log, the database, and whatever else was written
