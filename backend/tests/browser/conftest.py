"""A browser, and pages of it that bear no error and ask no other host."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from tests.support.server import StudioServer, start_server

AXE = Path(__file__).parent / "vendor/axe-core-4.14.1/axe.min.js"
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WAIT_MS = 240_000  # a loaded machine is slow; where all goes well nothing waits so long
_LIMIT_S = 900  # of a test, with several such waits
# What a page may say after the server was ended on purpose.
_OF_A_LOST_SERVER = ("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(_LIMIT_S))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The distribution's Chromium; TEST_BROWSER names another."""
    path = os.environ.get("TEST_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.fail("no browser: install the package chromium, or name one in TEST_BROWSER")
    expect.set_options(timeout=_WAIT_MS)
    with sync_playwright() as driver:
        # As root Chromium has no sandbox. These pages are ours.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Tab:
    """A page of the browser on one server.

    Attributes:
        page: Playwright's page.
        server: The server.
        problems: Errors on the console and in scripts, and requests to other hosts, so far.
    """

    def __init__(self, context: BrowserContext, server: StudioServer) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(_WAIT_MS)
        self.server, self.problems = server, list[str]()
        self.server_may_be_lost = False
        self.refusals_are_meant = False
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("request", self._asked)

    def _said(self, kind: str, text: str) -> None:
        if kind not in ("error", "warning"):
            return
        if self.server_may_be_lost and any(words in text for words in _OF_A_LOST_SERVER):
            return
        if self.refusals_are_meant and "the server responded with a status of 4" in text:
            return
        self.problems.append(f"console: {text}")

    def _asked(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != f"127.0.0.1:{self.server.port}":
            self.problems.append(f"asked another host: {request.url}")

    def open(self, path: str) -> Page:
        """Go to a page of the server."""
        self.page.goto(f"http://127.0.0.1:{self.server.port}{path}")
        return self.page

    def accessible(self) -> None:
        """Assert that axe finds nothing in the page as it is now: WCAG 2 A and AA."""
        # In a world of its own: the page's Content-Security-Policy admits no script of ours there.
        self.page.evaluate(AXE.read_text())
        found = self.page.evaluate(
            "(rules) => axe.run(document, {runOnly: rules})",
            ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
        )
        said = [
            f"{violation['id']}: {violation['help']}: {[node['target'] for node in violation['nodes']][:4]}"
            for violation in found["violations"]
        ]
        assert said == [], json.dumps(said, indent=1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    """One server with a tiny model for all tests that do not end it or need it empty."""
    with start_server(tmp_path_factory.mktemp("home"), model_dirs) as server:
        yield server


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Open tabs on servers; at the end none of them has a problem."""
    made: list[tuple[BrowserContext, Tab]] = []

    def make(server: StudioServer, **options: Any) -> Tab:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        tab = Tab(context, server)
        made.append((context, tab))
        return tab

    yield make
    problems = [problem for _, tab in made for problem in tab.problems]
    for context, _ in made:
        context.close()
    assert problems == []


@pytest.fixture
def tab(open_tab: Callable[..., Tab], server: StudioServer) -> Tab:
    """A tab on the common server."""
    return open_tab(server)
