"""How soon a page is seen, idle and beside a fine-tune, and how soon 20 runs of 5,000 points lie over one another.

It needs Chromium, as `make test-browser` does. The seconds are the browser's own, from the beginning of the navigation.
The processor time of the comparison says what they become on a machine that does nothing else.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from tests.support.long_runs import add_long_runs
from tests.support.server import CACHE, StudioServer

VISITS = 5
RUNS, POINTS = 20, 5000
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = ("/", "/new", "/runs", "/runs/{job}", "/playground", "/datasets", "/models", "/adapters")
_WAIT_MS = 300_000
# Notes when an element matches, in milliseconds after the navigation began.
_WATCH = """
new MutationObserver(() => {
  if (window.drawnAt || !document.querySelector("#chart[data-drawn]")) return;
  requestAnimationFrame(() => (window.drawnAt = performance.now()));
}).observe(document, { subtree: true, childList: true, attributes: true });
"""


def first_paint_s(page: Page, address: str) -> float:
    """Open a page in a tab of its own and return when its first content was painted."""
    page.goto(address)
    while not (
        paints := page.evaluate("performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)")
    ):
        page.wait_for_timeout(20)
    return float(paints[0]) / 1000


def show(name: str, values: list[float]) -> None:
    """Print the median and the slowest."""
    print(f"{name:42} median {statistics.median(values):5.2f} s   slowest {max(values):5.2f} s", flush=True)


def paints(browser: Browser, server: StudioServer, job_id: str, when: str) -> None:
    """Measure every page."""
    for path in PAGES:
        address = f"http://127.0.0.1:{server.port}{path.format(job=job_id)}"
        seen = []
        for _ in range(VISITS):
            context = browser.new_context()  # with nothing kept from the visit before
            page = context.new_page()
            page.set_default_timeout(_WAIT_MS)
            seen.append(first_paint_s(page, address))
            context.close()
        show(f"{path.replace('/{job}', '/…')} first painted, {when}", seen)


def compared(browser: Browser, server: StudioServer) -> None:
    """Measure the runs over one another."""
    query = "&".join(f"id=job_{number}" for number in range(1, RUNS + 1))
    seen, processor = [], []
    for _ in range(VISITS):
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(_WAIT_MS)
        page.add_init_script(_WATCH)
        inspector = context.new_cdp_session(page)
        inspector.send("Performance.enable", {"timeDomain": "threadTicks"})
        before_s = server.processor_s()
        page.goto(f"http://127.0.0.1:{server.port}/runs/compare?{query}")
        page.locator("#chart[data-drawn]").wait_for(state="attached")
        while (drawn_at := page.evaluate("window.drawnAt")) is None:
            page.wait_for_timeout(20)
        seen.append(float(drawn_at) / 1000)
        metrics = inspector.send("Performance.getMetrics")["metrics"]
        page_s = next(float(metric["value"]) for metric in metrics if metric["name"] == "TaskDuration")
        processor.append(server.processor_s() - before_s + page_s)
        context.close()
    show(f"{RUNS} runs of {POINTS} points drawn, idle", seen)
    show("   processor time of server and page", processor)


def main() -> None:
    """Measure idle, then while the embedded model is fine-tuned."""
    chromium = os.environ.get("TEST_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no browser: install the package chromium, or name one in TEST_BROWSER")
        return
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(n)))} for n in range(1, 60)]
    environment = {"PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as home, sync_playwright() as driver:
        add_long_runs(Path(home), RUNS, POINTS)
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        with StudioServer(Path(home), os.environ | environment) as server:
            paints(browser, server, "job_1", "idle")
            compared(browser, server)
            dataset = server.upload("\n".join(map(json.dumps, rows)))
            job = server.submit(model_id=MODEL_ID, dataset_id=dataset["id"], overrides={"max_steps": 100_000})
            server.wait_for_step(job["id"], 2)
            paints(browser, server, job["id"], "while training")
            server.http.post(f"/api/training/jobs/{job['id']}/cancel")
            server.events(job["id"])
        browser.close()
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
