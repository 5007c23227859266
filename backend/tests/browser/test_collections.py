"""Runs, models and adapters: found, looked at, exported."""

import json
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Tab
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def trained(server: StudioServer) -> dict[str, Any]:
    """A job of two steps that succeeded, with its adapter."""
    turns = [{"role": "user", "content": f"question {HOSTILE}"}, {"role": "assistant", "content": "the wanted answer"}]
    rows = "".join(
        json.dumps({"messages": [*turns, {"role": "user", "content": str(number)}, turns[1]]}) + "\n"
        for number in range(12)
    )
    dataset = server.upload(rows, name=f"Rows {HOSTILE}")
    job = server.submit(
        model_id=TINY_ID,
        dataset_id=dataset["id"],
        name=f"Adapter {HOSTILE}",
        overrides={"max_steps": 2, "batch_size": 1, "max_seq_length": 64, "checkpoint_every_steps": 1},
    )
    return server.wait_for_state(job["id"], "succeeded")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/runs", "Adapter"),
        ("/new", "gradient accumulation"),
        ("/models", TINY_ID),
        (f"/models/{TINY_ID}", "LlamaForCausalLM"),
        ("/adapters", "Adapter"),
        ("/adapters/{adapter_id}", "GGUF q8_0"),
    ],
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_is_accessible_and_shows_strings_of_strangers_as_text(
    open_tab: Callable[..., Tab], server: StudioServer, trained: dict[str, Any], path: str, shown: str, scheme: str
) -> None:
    tab = open_tab(server, color_scheme=scheme, viewport={"width": 390, "height": 800})
    page = tab.open(path.format_map(trained))
    expect(page.locator("main")).to_contain_text(shown)
    expect(page.locator("img[src=x]")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
    tab.accessible()


def test_an_adapter_is_exported_and_the_file_can_be_had(tab: Tab, trained: dict[str, Any]) -> None:
    page = tab.open(f"/adapters/{trained['adapter_id']}")
    page.get_by_role("button", name="Merged", exact=True).click()
    expect(page.locator("#exports .state-succeeded")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="All as a zip").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert b"LlamaForCausalLM" in archive.read("config.json")


def test_an_unknown_run_is_a_page(tab: Tab) -> None:
    tab.refusals_are_meant = True
    page = tab.open("/runs/job_none")
    expect(page.get_by_role("heading", name="Job not found")).to_be_visible()
    tab.accessible()
