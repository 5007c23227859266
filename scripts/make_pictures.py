"""Makes the pictures of the README from a real run: `make pictures`.

It starts a server with a data directory of its own, fine-tunes the embedded model on the quickstart's rows through the
pages, as a person would, and takes a picture of each page. It needs Chromium, as `make test-browser` does, and no
network.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs/pictures"
ROWS = ROOT / "quickstart/pip_the_parrot.jsonl"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WAIT_MS = 1_200_000  # a fine-tune on a busy machine


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(home: Path, port: int) -> "subprocess.Popen[bytes]":
    environment = os.environ | {
        "PEFT_STUDIO_HOME": str(home),
        "PEFT_STUDIO_PORT": str(port),
        "PEFT_STUDIO_CACHE_DIR": str(ROOT / ".cache"),
        "HF_HUB_OFFLINE": "1",
    }
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "main.py"], cwd=ROOT / "backend", env=environment, stdout=log, stderr=log
        )
    while server.poll() is None:
        with suppress(URLError, ConnectionError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return server
        time.sleep(0.1)
    raise SystemExit((home / "server.log").read_text())


def _take(page: Page, name: str) -> None:
    page.wait_for_timeout(400)  # bars and curves come to rest
    page.screenshot(path=TARGET / f"{name}.png")
    print(f"docs/pictures/{name}.png")


def take_all(page: Page, url: str) -> None:
    """Do the quickstart's fine-tune through the pages, and take the pictures on the way."""
    page.goto(f"{url}/new")
    page.get_by_role("radio", name=MODEL).check()
    page.get_by_label("choose one").set_input_files(ROWS)
    page.locator("#analysis mark").first.wait_for()
    for name, value in (("max seq length", "128"), ("epochs", "1"), ("eval every steps", "5")):
        page.get_by_label(name, exact=True).fill(value)
        page.get_by_label(name, exact=True).blur()
        page.locator("tr.source-override", has_text=name).wait_for()
    page.locator("#analysis:not([aria-busy]) mark").first.wait_for()
    page.evaluate("scrollTo(0, 0)")
    page.set_viewport_size({"width": 1280, "height": 1400})
    _take(page, "new-fine-tune")
    page.set_viewport_size({"width": 1280, "height": 860})
    page.get_by_label("Name", exact=True).fill("Pip the parrot")
    page.get_by_role("button", name="Start the fine-tune").click()
    page.wait_for_url(re.compile(r"/runs/job_"))
    address = page.url
    page.locator("#run[data-state=running]").wait_for(state="attached")
    page.locator("#chart-loss").wait_for()
    page.goto(url)
    page.locator("article.run dd", has_text=re.compile(r"^(1\d|8|9) of")).wait_for()  # a curve of some steps
    page.set_viewport_size({"width": 1280, "height": 560})
    _take(page, "home")
    page.set_viewport_size({"width": 1280, "height": 860})
    page.goto(address)
    page.locator("#run[data-state=succeeded]").wait_for(state="attached")
    page.reload()
    page.locator("#run[data-ready]").wait_for(state="attached")
    _take(page, "run")
    page.get_by_role("link", name="Try it").click()
    page.get_by_label("At most (tokens)").fill("40")
    page.get_by_label("Question", exact=True).fill("Who are you?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".answer[aria-busy=false]").nth(1).wait_for()
    page.get_by_text(" tokens ·").nth(1).wait_for()
    _take(page, "playground")


def main() -> int:
    """Make the pictures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default=os.environ.get("TEST_BROWSER") or shutil.which("chromium"))
    browser = parser.parse_args().browser
    if browser is None:
        print("No browser: install the package chromium, or name one with --browser.", file=sys.stderr)
        return 1
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        server = _start(Path(folder), port)
        try:
            with sync_playwright() as driver:
                chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
                page = chromium.new_page(viewport={"width": 1280, "height": 860})
                page.set_default_timeout(_WAIT_MS)
                take_all(page, f"http://127.0.0.1:{port}")
                chromium.close()
        finally:
            server.terminate()
            server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
