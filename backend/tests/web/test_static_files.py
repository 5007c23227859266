"""Scripts and styles: kept for ever under an address that changes with them, small over the wire, and as fetched."""

import gzip
import json
from pathlib import Path

import pytest
import vendor_web
from fastapi import FastAPI
from fastapi.testclient import TestClient

from web.assets import FOLDER, Assets, get_assets
from web.static_files import router

_MOST_BYTES = 150_000  # of script and style that a page sends over the wire, docs apart


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def test_every_file_comes_compressed_and_is_kept_for_ever(client: TestClient) -> None:
    names = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()]
    assert "style.css" in names
    for name in names:
        with client.stream("GET", get_assets().url(name), headers={"Accept-Encoding": "gzip"}) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-encoding"] == "gzip"
            assert "immutable" in answer.headers["cache-control"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert gzip.decompress(b"".join(answer.iter_raw())) == (FOLDER / name).read_bytes()
        plain = client.get(get_assets().url(name), headers={"Accept-Encoding": "identity"})
        assert plain.content == (FOLDER / name).read_bytes()
        assert "content-encoding" not in plain.headers
    assert client.get(get_assets().url("app.js")).headers["content-type"].startswith("text/javascript")


def test_a_file_that_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get(get_assets().url("app.js"))
    again = client.get(get_assets().url("app.js"), headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")


def test_an_address_of_another_version_is_looked_at_again(client: TestClient) -> None:
    assert client.get("/static/another/app.js").headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["none.js", "../pages.py", "%2e%2e/pages.py", "vendor", "", "/etc/passwd"])
def test_nothing_else_is_sent(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{get_assets().version}/{name}").status_code == 404


def test_the_version_changes_with_any_file(tmp_path: Path) -> None:
    versions: set[str] = set()
    for name, content in (("a.js", b"1"), ("a.js", b"2"), ("b.js", b"2")):
        folder = tmp_path / str(len(versions))
        folder.mkdir()
        (folder / name).write_bytes(content)
        versions.add(Assets(folder).version)
    assert len(versions) == 3


def test_all_pages_together_send_little_over_the_wire() -> None:
    sent = [
        path
        for path in FOLDER.rglob("*")
        if path.suffix in (".js", ".css") and "swagger" not in path.as_posix() and path.name != "docs.js"
    ]
    assert sum(len(gzip.compress(path.read_bytes(), 9)) for path in sent) <= _MOST_BYTES


def test_what_others_wrote_is_as_it_was_fetched() -> None:
    assert vendor_web.problems() == []
    recorded = json.loads(vendor_web.RECORD.read_text())
    for package in vendor_web.PACKAGES:
        assert f"{package.target}/LICENSE" in recorded, "every package comes with its licence"


def test_another_archive_is_refused() -> None:
    with pytest.raises(vendor_web.WrongDigest):
        vendor_web.taken(vendor_web.PACKAGES[0], b"another")
