"""The playground: answers side by side, blind, of a dataset's questions, and what does not fit."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from tests.browser.conftest import Tab
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID

HOSTILE = "<img src=x onerror=alert(1)> in the playground"
QUESTIONS = [f"{HOSTILE} question {number}" for number in range(3)]
ROWS = "".join(json.dumps({"prompt": question, "completion": "the answer"}) + "\n" for question in QUESTIONS)


@pytest.fixture(scope="module")
def trained(server: StudioServer) -> dict[str, Any]:
    """A run on the tiny model, with two checkpoints and an adapter."""
    dataset = server.upload(ROWS, name=HOSTILE)
    settings = {"max_steps": 4, "batch_size": 1, "max_seq_length": 64, "checkpoint_every_steps": 2}
    job = server.submit(
        model_id=TINY_ID, dataset_id=dataset["id"], name=HOSTILE, overrides=settings, validation_fraction=0.34
    )
    return server.wait_for_state(job["id"], "succeeded")


@pytest.fixture(autouse=True)
def _nothing_is_loaded(server: StudioServer) -> None:
    """Unload what other tests of the common server have left: a loaded model is not loaded again."""
    for model in server.http.get("/api/peft/loaded-models").json()["models"]:
        assert server.http.delete(f"/api/peft/loaded-models/{model['id']}").status_code == 204


def test_a_model_that_does_not_fit_is_refused_with_figures_and_with_what_helps(tab: Tab) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(route: Route) -> None:
        asked.append(dict(route.request.post_data_json or {}))
        change = {
            "change": "quantization=nf4",
            "overrides": {"dropout": 0.0},
            "estimate_bytes": 2**30,
            "verdict": "fits",
        }
        problem = {
            "title": "Does not fit",
            "estimate_bytes": 3 * 2**30,
            "available_bytes": 2**31,
            "suggestions": [change],
        }
        route.fulfill(status=409, content_type="application/problem+json", body=json.dumps(problem))

    tab.refusals_are_meant = True
    page = tab.open(f"/playground?model={TINY_ID}")
    page.route("**/api/peft/load-model", refuse)
    page.get_by_label("Question", exact=True).fill("the quick brown fox")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_text("needs 3.0 GiB, and 2.0 GiB can be had")).to_be_visible()
    tab.accessible()
    page.get_by_role("button", name="quantization=nf4 (1.0 GiB)").click()
    expect(page.get_by_role("button", name="Leave it")).to_be_focused()
    page.get_by_role("button", name="Leave it").click()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
    expect(page.get_by_label("Question", exact=True)).to_have_value("the quick brown fox")
    assert [body["overrides"] for body in asked] == [{}, {"dropout": 0.0}]


def test_base_adapter_and_checkpoint_answer_side_by_side_with_one_seed(tab: Tab, trained: dict[str, Any]) -> None:
    page = tab.open(f"/playground?adapter={trained['adapter_id']}")
    checkpoint = page.locator(f"input[data-kind=checkpoint][value^='{trained['id']}/'][value$='2']")
    checkpoint.check()
    page.get_by_label("At most (tokens)").fill("12")
    question = page.get_by_label("Question", exact=True)
    question.fill("the quick brown fox")
    question.press("Control+Enter")  # the model is loaded on demand
    answers = page.locator(".answer[aria-busy=false]")
    expect(answers).to_have_count(3)
    assert [text.split("\n")[0] for text in answers.all_inner_texts()] == ["Base", HOSTILE, f"{HOSTILE}, step 2"]
    expect(page.get_by_text("12 tokens ·")).to_have_count(3)
    said = answers.first.locator(".text").text_content()
    question.fill("the quick brown fox")
    page.get_by_role("button", name="New conversation").click()
    question.press("Control+Enter")
    expect(answers).to_have_count(3)
    assert answers.first.locator(".text").text_content() == said, "the same seed gives the same answer"
    expect(page.locator("img[src=x]")).to_have_count(0)
    tab.accessible()
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    expect(page.locator("input[name=answers]:checked")).to_have_count(3)


def test_an_answer_is_stopped_and_the_conversation_goes_on(tab: Tab, trained: dict[str, Any]) -> None:
    page = tab.open(f"/playground?model={TINY_ID}")
    page.get_by_label("At most (tokens)").fill("2")
    page.get_by_label("Question", exact=True).fill("the quick brown fox")
    held: list[Route] = []
    page.route("**/generate", lambda route: held.append(route))  # an answer that does not come
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer[aria-busy=true]")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.get_by_text("stopped", exact=True)).to_be_visible()
    page.unroute("**/generate")
    page.get_by_label("Question", exact=True).fill("and again")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(2)


def test_what_a_run_has_held_out_is_asked_by_itself(tab: Tab, trained: dict[str, Any]) -> None:
    held = tab.server.http.get(f"/api/training/jobs/{trained['id']}/validation").json()
    (row,) = held["rows"]
    page = tab.open(f"/runs/{trained['id']}")
    page.get_by_role("link", name="Ask what was held out").click()
    expect(page.get_by_text(f"Held-out row 1 of 1: row {row['row'] + 1} of the dataset")).to_be_visible()
    expect(page.get_by_label("Question", exact=True)).to_have_value(QUESTIONS[row["row"]])
    expect(page.get_by_role("button", name="Next prompt")).to_be_disabled()
    page.get_by_label("At most (tokens)").fill("2")
    page.get_by_role("button", name="Ask all that follow").click()
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(2)
    tab.accessible()
    page.get_by_label("Questions of a dataset").select_option(trained["dataset_id"])
    expect(page.get_by_text(f"Row 1 of {len(QUESTIONS)}")).to_be_visible()


def test_blind_the_questions_of_a_dataset_are_judged_and_counted(
    open_tab: Callable[..., Tab], server: StudioServer, trained: dict[str, Any]
) -> None:
    tab = open_tab(server, color_scheme="dark", viewport={"width": 360, "height": 720})
    where = f"adapter={trained['adapter_id']}&dataset={trained['dataset_id']}&row=1&blind=1"
    page = tab.open(f"/playground?{where}")
    expect(page.get_by_label("Question", exact=True)).to_have_value(QUESTIONS[1])
    page.get_by_label("At most (tokens)").fill("4")
    page.get_by_role("button", name="Ask all that follow").click()
    expect(page.get_by_role("button", name="A is best")).to_be_visible()
    names = page.locator(".answer h2")
    assert names.all_inner_texts() == ["A", "B"]
    tab.accessible()
    page.keyboard.press("b")
    expect(names.nth(1)).to_contain_text("B: ")
    best = names.nth(1).inner_text().removeprefix("B: ")
    expect(page.get_by_text(f"Row 3 of {len(QUESTIONS)}")).to_be_visible()
    page.get_by_role("button", name="All alike").click()
    page.get_by_text("The blind count").click()
    count = page.get_by_role("row").filter(has=page.get_by_role("cell", name=best, exact=True))
    assert count.get_by_role("cell").all_inner_texts() == [best, "1", "2"]
    page.get_by_text("What the dataset answers").first.click()
    expect(page.get_by_text("the answer", exact=True).first).to_be_visible()
    tab.accessible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
