"""A run's page: live, reloaded, and over the death of its server; and runs side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import Tab
from tests.support.long_runs import add_long_runs
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID

ROWS = "".join(f'{{"prompt": "question {number}", "completion": "an answer"}}\n' for number in range(8))
SETTINGS = {"batch_size": 1, "gradient_accumulation": 1, "max_seq_length": 64}


def _begin(server: StudioServer, steps: int, **overrides: Any) -> str:
    dataset = server.upload(ROWS, name="rows")
    settings = SETTINGS | {"max_steps": steps, "eval_every_steps": 5} | overrides
    job = server.submit(
        model_id=TINY_ID, dataset_id=dataset["id"], validation_fraction=0.25, name=f"{steps} steps", overrides=settings
    )
    return str(job["id"])


def _points(page: Page) -> list[int]:
    steps: list[int] = page.evaluate("[...window.run.steps.keys()].sort((a, b) => a - b)")
    return steps


def _wait_for_points(page: Page, count: int) -> None:
    expect(page.locator("#run[data-ready]")).to_be_attached()
    wait_until(lambda: len(_points(page)) >= count)


def test_a_run_is_followed_to_its_end_and_is_whole_after_a_reload(tab: Tab) -> None:
    server = tab.server
    job_id = _begin(server, 12)
    page = tab.open(f"/runs/{job_id}")
    expect(page.locator("#run[data-state=succeeded]")).to_be_attached()
    expect(page.get_by_role("link", name="Try it")).to_be_visible()
    for _ in range(2):
        assert _points(page) == list(range(1, 13))
        assert page.evaluate("[...window.run.evaluations.keys()]") == [0, 5, 10, 12]
        for curve in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Memory"):
            expect(page.locator("figcaption", has_text=curve).first).to_be_visible()
        page.reload()
        expect(page.locator("#run[data-ready]")).to_be_attached()
    tab.accessible()


def _held(page: Page, address: str) -> list[Route]:
    """Hold every answer from an address; the list gets them."""
    held: list[Route] = []
    page.route(address, lambda route: held.append(route))
    return held


def _await_one(page: Page, held: list[Route]) -> Route:
    while not held:
        page.wait_for_timeout(20)  # lets the driver hear of requests
    return held.pop()


def _cancelled_while_loading(tab: Tab) -> tuple[str, Page, Route]:
    """Open a run's page, and cancel the run before the page has its curves; the third is its question for them."""
    job_id = _begin(tab.server, 5000)
    held = _held(tab.page, "**/curves")
    page = tab.open(f"/runs/{job_id}")
    curves = _await_one(page, held)
    tab.server.http.post(f"/api/training/jobs/{job_id}/cancel")
    tab.server.wait_for_state(job_id, "cancelled")
    return job_id, page, curves


def test_what_happens_while_the_page_is_still_loading_is_shown(tab: Tab) -> None:
    _, page, curves = _cancelled_while_loading(tab)
    curves.continue_()
    expect(page.locator("#run[data-state=cancelled]")).to_be_attached()
    expect(page.locator("h1")).to_contain_text("cancelled")
    expect(page.locator("#events").get_by_text("cancelled")).to_be_visible()
    sequences = page.locator("#events li").evaluate_all("lines => lines.map((line) => Number(line.dataset.sequence))")
    assert sequences == sorted(set(sequences)), "each event is there once"


def test_an_answer_that_comes_late_does_not_replace_a_newer_one(tab: Tab) -> None:
    job_id = _begin(tab.server, 5000)
    page = tab.open(f"/runs/{job_id}")
    expect(page.locator("#run[data-state=running]")).to_be_attached()
    expect(page.locator("h1")).to_contain_text("running")
    held = _held(page, "**/head")
    tab.server.http.post(f"/api/training/jobs/{job_id}/pause")
    late = _await_one(page, held)
    older = late.fetch()
    tab.server.wait_for_state(job_id, "paused")
    expect(page.locator("#run[data-state=paused]")).to_be_attached()
    for newer in held:
        newer.continue_()
    late.fulfill(response=older)
    _await_one(page, held).continue_()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    expect(page.locator("h1")).to_contain_text("paused")
    page.unroute("**/head")
    page.get_by_role("button", name="Cancel…").click()
    tab.server.http.post(f"/api/training/jobs/{job_id}/cancel")
    expect(page.locator("#run[data-state=cancelled]")).to_be_attached()
    page.get_by_role("button", name="Let it run").click()
    expect(page.locator("h1")).to_contain_text("cancelled")  # an open dialog is left alone until it is closed


def test_a_run_that_was_deleted_is_said_once(tab: Tab) -> None:
    tab.refusals_are_meant = True
    job_id, page, curves = _cancelled_while_loading(tab)
    assert tab.server.http.delete(f"/api/training/jobs/{job_id}").status_code == 204
    curves.fulfill(json={"steps": {"step": []}, "evaluations": {"step": []}})
    expect(page.get_by_text(f"No training job has the id {job_id}")).to_be_visible()


def test_a_zoom_of_one_curve_is_a_zoom_of_all(tab: Tab) -> None:
    jobs = tab.server.http.get("/api/training/jobs", params={"state": "succeeded"}).json()["jobs"]
    job = next(job for job in jobs if job["name"] == "12 steps")
    page = tab.open(f"/runs/{job['id']}")
    expect(page.locator("#run[data-ready]")).to_be_attached()
    over = page.locator("#chart-loss .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 40, steps=5)
    page.mouse.up()
    ranges = page.evaluate(
        "[...window.run.charts.charts.values()].map((chart) => [chart.scales.x.min, chart.scales.x.max])"
    )
    assert len(ranges) >= 5
    assert all(each == ranges[0] for each in ranges)
    assert 0 < ranges[0][0] < ranges[0][1] < 12
    page.get_by_role("button", name="Whole run").click()
    expect(page.get_by_role("button", name="Whole run")).to_be_disabled()


def test_a_killed_server_is_said_and_the_page_goes_on_without_a_lost_point(
    open_tab: Callable[..., Tab], tmp_path: Path, model_dirs: Path
) -> None:
    with start_server(tmp_path, model_dirs) as server:
        tab = open_tab(server)
        tab.server_may_be_lost = True
        job_id = _begin(server, 60, checkpoint_every_steps=5)
        page = tab.open(f"/runs/{job_id}")
        _wait_for_points(page, 8)
        server.kill()
        expect(page.get_by_text("The server does not answer; trying again")).to_be_visible()
        page.evaluate("window.stays = true")
        server.start()
        expect(page.locator("#run[data-state=succeeded]")).to_be_attached()
        expect(page.get_by_text("The server does not answer")).to_have_count(0)
        assert page.evaluate("window.stays"), "the page was not loaded again"
        assert _points(page) == list(range(1, 61))
        assert server.job(job_id)["attempts"] == 2


def test_a_run_is_paused_resumed_and_cancelled_with_its_adapter_kept(tab: Tab) -> None:
    job_id = _begin(tab.server, 5000)
    page = tab.open(f"/runs/{job_id}")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#run[data-state=running]")).to_be_attached()
    _wait_for_points(page, 2)
    page.get_by_role("button", name="Write a checkpoint").click()
    expect(page.locator("#checkpoints td.mono").first).to_be_visible()
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("button", name="The adapter as it is now").click()
    expect(page.get_by_role("link", name="Adapter", exact=True)).to_be_visible()
    assert tab.server.job(job_id)["adapter_id"] is not None


def test_twenty_runs_of_5000_points_are_drawn_over_one_another(
    open_tab: Callable[..., Tab], tmp_path: Path, model_dirs: Path
) -> None:
    add_long_runs(tmp_path, 20, 5000)
    with start_server(tmp_path, model_dirs) as server:
        tab = open_tab(server)
        page = tab.open("/runs")
        for box in page.locator(".pick").all():
            box.check()
        page.get_by_role("button", name="Compare 20").click()
        expect(page.locator("#chart[data-drawn=loss]")).to_be_attached()
        expect(page.locator("#chart .u-legend .u-series")).to_have_count(21)
        expect(page.get_by_role("columnheader", name="rank")).to_be_visible()
        expect(page.get_by_role("columnheader", name="alpha")).to_have_count(0)
        tab.accessible()
        page.get_by_role("link", name="rank 20", exact=True).click()
        expect(page.get_by_text("No memory for <b>this</b>.")).to_be_visible()
        expect(page.get_by_text("halve max_seq_length")).to_be_visible()
        tab.open("/")
        expect(page.get_by_role("heading", name="rank 20 failed")).to_be_visible()
