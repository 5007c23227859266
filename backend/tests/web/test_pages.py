"""What holds for every template and every page."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.testclient import TestClient

from core.errors import JobNotFound
from web.assets import FOLDER
from web.docs_page import router as docs
from web.pages import CONTENT_SECURITY_POLICY, get_templates, page, pages_router, render
from web.shown import count, duration, number, size

TEMPLATES = sorted((FOLDER.parent / "templates").glob("*.html"))
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_no_template_has_script_style_or_a_foreign_address_in_it(template: Path) -> None:
    text = template.read_text()
    assert re.findall(r"\s(?:on[a-z]+|style|hx-on[^=\s]*)\s*=", text) == []
    assert re.findall(r"<style|<script(?![^>]*\ssrc=)", text) == []
    assert re.findall(r"(?:src|href|action|hx-(?:get|post))=\"(?:https?:)?//", text) == []
    assert "|safe" not in text.replace(" ", "")
    assert "autoescape" not in text


def test_our_scripts_put_no_text_of_others_into_the_page_as_html() -> None:
    found = {
        f"{path.name}: {line.strip()}"
        for path in FOLDER.glob("*.js")
        for line in path.read_text().splitlines()
        if re.search(r"innerHTML|outerHTML|DOMParser|insertAdjacentHTML|document\.write|\beval\(|new Function", line)
    }
    # What the server has rendered, and escaped.
    shown = 'place.replaceChildren(...new DOMParser().parseFromString(html, "text/html").body.childNodes);'
    assert found == {f"app.js: {shown}"}


def test_every_value_is_escaped() -> None:
    text = render("error.html", path="/", title=HOSTILE, detail=HOSTILE, csrf=None)
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_body_for_the_api_cannot_break_out_of_its_attribute() -> None:
    macros = get_templates().get_template("macros.html").module
    text = macros.action("Go", "POST", "/api/x", body={"name": HOSTILE})  # type: ignore[attr-defined]
    assert "<script" not in text
    assert "<img" not in text
    assert re.search(r'data-body="[^"]*" title="POST /api/x"', text)


@pytest.fixture
def client() -> TestClient:
    router = pages_router()

    @router.get("/gone")
    def gone(request: Request) -> HTMLResponse:
        raise JobNotFound(f"No training job has the id {HOSTILE}.")

    @router.get("/number/{value}")
    def shows_a_number(request: Request, value: int) -> HTMLResponse:
        return page(request, "error.html", title=str(value), detail="")

    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(router)
    app.include_router(docs)
    return TestClient(app)


def test_an_error_is_a_page_with_its_status(client: TestClient) -> None:
    answer = client.get("/gone")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert "No training job has the id &lt;script&gt;" in answer.text
    assert client.get("/number/x").status_code == 422


def test_an_error_of_a_part_is_a_part(client: TestClient) -> None:
    answer = client.get("/gone", headers={"HX-Request": "true"})
    assert answer.status_code == 200
    assert "<html" not in answer.text
    assert 'role="alert"' in answer.text


def test_a_page_allows_nothing_foreign(client: TestClient) -> None:
    for path in ("/docs", "/gone"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "http" not in CONTENT_SECURITY_POLICY


def test_the_document_of_the_api_names_no_other_host(client: TestClient) -> None:
    assert re.findall(r"(?:src|href)=\"(?!/static/)[^\"]*\"", client.get("/docs").text) == []
    assert client.get("/redoc", follow_redirects=False).headers["location"] == "/docs"


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (size(None), "–"),
        (size(0), "0 B"),
        (size(1023), "1023 B"),
        (size(1024), "1.0 KiB"),
        (size(25 * 1024**3), "25.0 GiB"),
        (duration(None), "–"),
        (duration(0), "0 s"),
        (duration(4.25), "4.2 s"),
        (duration(59.6), "1 min 0 s"),
        (duration(3725), "1 h 2 min"),
        (duration(200000), "2 d 7 h"),
        (number(None), "–"),
        (number(1234567), "1,234,567"),
        (number(0.000512), "0.000512"),
        (number(2.34567), "2.346"),
        (count(134_515_008), "135 M"),
        (count(7_615_616_512), "7.6 B"),
    ],
)
def test_figures_are_written_for_people(written: str, wanted: str) -> None:
    assert written == wanted
