"""The home page: the machine live, what runs and waits, and what needs a person."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Tab
from tests.support.server import StudioServer, start_server
from tests.support.tiny_model import TINY_ID

ROWS = '{"prompt": "a <b>bold</b> question", "completion": "an answer"}\n' * 8
HOSTILE = "<img src=x onerror=alert(1)>"


def test_the_page_shows_a_job_that_begins_and_ends_without_being_reloaded(
    open_tab: Callable[..., Tab], tmp_path: Path, model_dirs: Path
) -> None:
    with start_server(tmp_path, model_dirs) as server:
        _follow(open_tab(server), server)


def _follow(tab: Tab, server: StudioServer) -> None:
    page = tab.open("/")
    expect(page.get_by_role("heading", name="This machine")).to_be_visible()
    page.get_by_role("button", name="Run the quickstart's fine-tune").click()
    page.wait_for_url("**/runs/job_*")
    first = page.url.rsplit("/", 1)[1]
    assert server.job(first)["config"]["epochs"] == 3
    server.http.post(f"/api/training/jobs/{first}/cancel")
    server.wait_for_state(first, "cancelled")
    page = tab.open("/")
    expect(page.get_by_text("Nothing is running.")).to_be_visible()
    dataset = server.upload(ROWS, name="rows")
    job = server.submit(
        model_id=TINY_ID,
        dataset_id=dataset["id"],
        name=HOSTILE,
        overrides={"max_steps": 2, "batch_size": 1, "max_seq_length": 64},
    )
    server.wait_for_state(job["id"], "succeeded")
    expect(page.get_by_role("region", name="Ended").get_by_text(HOSTILE)).to_be_visible()
    expect(page.locator("img[src=x]")).to_have_count(0)
    tab.accessible()
    page.goto("about:blank")  # no stream is open when the server ends


def test_what_comes_while_a_part_has_the_focus_is_shown_when_it_has_moved_on(tab: Tab) -> None:
    server = tab.server
    loaded = server.load(TINY_ID)
    page = tab.open("/")
    button = page.get_by_title(f"DELETE /api/peft/loaded-models/{loaded['id']}")
    button.focus()
    assert server.http.delete(f"/api/peft/loaded-models/{loaded['id']}").status_code == 204
    dataset = server.upload(ROWS, name="rows")
    job = server.submit(
        model_id=TINY_ID, dataset_id=dataset["id"], name="the later news", overrides={"max_steps": 5000}
    )
    server.http.post(f"/api/training/jobs/{job['id']}/cancel")
    expect(page.get_by_role("region", name="Ended").get_by_text("the later news")).to_be_visible()
    expect(button).to_be_focused()
    page.locator("#theme").focus()
    expect(button).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_in_both_themes_and_on_a_narrow_screen(
    open_tab: Callable[..., Tab], server: StudioServer, scheme: str
) -> None:
    tab = open_tab(server, color_scheme=scheme, viewport={"width": 360, "height": 720})
    page = tab.open("/")
    expect(page.get_by_role("heading", name="This machine")).to_be_visible()
    tab.accessible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_keyboard_leads_to_every_page(tab: Tab) -> None:
    page = tab.open("/")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    for key, path in (("r", "/runs"), ("n", "/new"), ("m", "/models"), ("h", "/")):
        page.keyboard.press("g")
        page.keyboard.press(key)
        page.wait_for_url(f"http://127.0.0.1:{tab.server.port}{path}")
    page.go_back()
    page.wait_for_url("**/models")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()


def test_the_document_of_the_api_works_without_a_network(tab: Tab) -> None:
    page = tab.open("/docs")
    expect(page.get_by_text("/api/training/jobs", exact=True).first).to_be_visible()
