"""A new fine-tune: from dropping a file to the start, with each refusal at its field."""

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Error, Page, Route, expect

from tests.browser.conftest import Tab
from tests.support.tiny_model import TINY_ID

HOSTILE = "<img src=x onerror=alert(1)>"
ROWS = "".join(
    json.dumps({"prompt": f"question {number} {HOSTILE}", "completion": f"answer {number}"}) + "\n"
    for number in range(12)
)


def _open(tab: Tab) -> Page:
    page = tab.open("/new")
    expect(page.locator("#new[data-ready]")).to_be_attached()
    return page


def _choose(page: Page, tmp_path: Path) -> None:
    file = tmp_path / f"{HOSTILE.replace('/', '')}.jsonl"
    file.write_text(ROWS + "not json\n")
    page.get_by_role("radio", name=TINY_ID).check()
    page.get_by_label("choose one").set_input_files(file)
    expect(page.locator("#bad-lines")).to_contain_text("Line 13: not JSON")
    page.get_by_role("button", name="Keep the other 12 rows").click()
    expect(page.locator("#analysis mark").first).to_be_visible()


def test_a_file_becomes_a_running_fine_tune(tab: Tab, tmp_path: Path) -> None:
    tab.refusals_are_meant = True  # of the bad line
    page = _open(tab)
    _choose(page, tmp_path)
    expect(page.locator("#datasets .warning").first).to_contain_text("13")  # the line that is left out
    expect(page.locator("#analysis")).to_contain_text("onerror=alert(1)")
    expect(page.locator("#fit .verdict")).to_have_text("fits")
    expect(page.locator("img[src=x]")).to_have_count(0)
    tab.accessible()
    steps = page.get_by_label("max steps", exact=True)
    steps.fill("3")
    steps.blur()
    expect(page.locator("tr.source-override", has_text="max steps")).to_be_visible()
    expect(page.locator("#analysis:not([aria-busy]) dd").first).to_have_text("3")
    page.get_by_label("Name", exact=True).fill(HOSTILE)
    page.get_by_text("The same from a terminal or a script").click()
    said = page.locator("#as-curl").text_content() or ""
    command = shlex.split(said.replace("\\\n", " "))
    body = json.loads(command[-1])
    page.get_by_role("button", name="Start the fine-tune").click()
    page.wait_for_url("**/runs/job_*")
    expect(page.locator("h1")).to_contain_text(HOSTILE)
    made = tab.server.job(page.url.rsplit("/", 1)[1])
    assert made["name"] == HOSTILE == body["name"]
    assert made["config"]["max_steps"] == 3 == body["overrides"]["max_steps"]
    again = tab.server.http.post("/api/training/jobs", json=body)
    assert again.status_code == 202, "what the page shows for curl is what it sends"
    expect(page.locator("#run[data-state=succeeded]")).to_be_attached()
    tab.server.wait_for_state(again.json()["id"], "succeeded")  # a base that trains does not answer
    page.get_by_role("link", name="Try it").click()
    page.get_by_label("At most (tokens)").fill("4")
    page.get_by_label("Question", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(2)
    expect(page.get_by_text(re.compile(r"^[0-4] tokens? ·"))).to_have_count(2)
    expect(page.locator("img[src=x]")).to_have_count(0)


def test_each_refusal_stands_at_its_field(tab: Tab, tmp_path: Path) -> None:
    tab.refusals_are_meant = True
    page = _open(tab)
    page.get_by_role("button", name="Start the fine-tune").click()
    expect(page.locator(".refusal[data-of=model_id]")).to_have_text("Choose a model.")
    expect(page.locator(".refusal[data-of=dataset_id]")).to_contain_text("Choose a dataset")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no row at all\n")
    page.get_by_label("choose one").set_input_files(bad)
    expect(page.locator(".refusal[data-of=file]")).not_to_be_empty()
    _choose(page, tmp_path)
    for name, value in (("rank", "0"), ("learning rate", "7")):
        field = page.get_by_label(name, exact=True)
        field.fill(value)
        field.blur()
        expect(page.locator(f".refusal[data-of={name.replace(' ', '_')}]")).not_to_be_empty()
        expect(field).to_have_attribute("aria-invalid", "true")
        tab.accessible()
        page.get_by_role("button", name="Take every proposal again").click()
        expect(page.locator(".refusal:not(:empty)")).to_have_count(0)
    page.get_by_label("Held out for validation").fill("0.95")
    page.get_by_role("button", name="Start the fine-tune").click()
    expect(page.locator(".refusal[data-of=validation_fraction]")).not_to_be_empty()


def test_the_focus_stays_in_a_field_whose_settings_come_anew(tab: Tab) -> None:
    tab.refusals_are_meant = True
    page = _open(tab)
    held: list[Route] = []
    page.route("**/new/settings", lambda route: held.append(route))
    page.get_by_role("button", name="Take every proposal again").click()
    while not held:
        page.wait_for_timeout(20)  # lets the driver hear of requests
    field = page.get_by_label("learning rate", exact=True)
    field.focus()
    field.evaluate("(field) => (field.isOld = true)")
    held[0].continue_()
    expect(page.locator("#fit:not([aria-busy])")).to_be_attached()
    page.unroute("**/new/settings")
    assert field.evaluate("(field) => field.isOld") is None, "the settings came anew"
    expect(field).to_be_focused()
    page.keyboard.type("7")
    page.keyboard.press("Tab")
    expect(page.locator(".refusal[data-of=learning_rate]")).not_to_be_empty()
    expect(field).to_have_value("7")
    expect(page.get_by_label("epochs", exact=True)).to_be_focused()  # not called back to the field that was left


def test_the_dataset_chosen_last_stays_chosen_however_late_an_answer_comes(tab: Tab) -> None:
    for name in ("chosen first", "chosen last"):
        tab.server.upload(ROWS, name=name)
    page = _open(tab)
    held: list[Route] = []
    page.route("**/new/datasets*", lambda route: held.append(route))
    for number, name in enumerate(("chosen first", "chosen last"), 1):
        page.get_by_role("radio", name=name).check()
        while len(held) < number:
            page.wait_for_timeout(20)  # lets the driver hear of requests
    earlier, later = (route.fetch() for route in held)
    held[1].fulfill(response=later)
    expect(page.locator("#datasets .option:has(:checked)")).to_contain_text("chosen last")
    with suppress(Error):  # the page no longer waits for it
        held[0].fulfill(response=earlier)
    page.evaluate("fetch('/health')")
    expect(page.get_by_role("radio", name="chosen last")).to_be_checked()


def test_models_are_searched_before_any_download(tab: Tab) -> None:
    page = _open(tab)
    page.keyboard.press("/")
    page.keyboard.type("tiny")
    expect(page.locator("#models")).to_contain_text("Hub")
    expect(page.locator("#models .option")).to_have_count(1)
    expect(page.locator("#models .verdict").first).to_have_text("fits")
