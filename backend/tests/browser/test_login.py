"""With an API key set, the pages ask for it once."""

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import expect

from tests.browser.conftest import Tab
from tests.support.server import start_server


def test_a_person_logs_in_works_and_logs_out(open_tab: Callable[..., Tab], tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs, PEFT_STUDIO_API_KEY="sesame-canary") as server:
        tab = open_tab(server)
        tab.refusals_are_meant = True
        page = tab.open("/datasets")
        tab.accessible()
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_have_text("This is not the API key.")
        page.get_by_label("API key").fill("sesame-canary")
        page.keyboard.press("Enter")
        page.wait_for_url(f"http://127.0.0.1:{server.port}/datasets")
        rows = b'{"prompt": "p", "completion": "c"}\n'
        page.locator("#file").set_input_files({"name": "rows.jsonl", "mimeType": "text/plain", "buffer": rows})
        page.wait_for_url("**/datasets/ds_*")
        assert page.evaluate("document.cookie") == ""
        page.goto(f"data:text/html,<a href='http://127.0.0.1:{server.port}/runs?q=x'>A link of another site</a>")
        page.get_by_text("A link of another site").click()
        page.wait_for_url(f"http://127.0.0.1:{server.port}/runs?q=x")  # the login holds, although its cookie is strict
        expect(page.get_by_role("heading", name="Runs")).to_be_visible()
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url("**/login")
        tab.open("/")
        expect(page.get_by_label("API key")).to_be_visible()
