"""Datasets, adapters and models: brought in, looked at, and deleted with what depends on them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import FilePayload, Route, expect

from tests.browser.conftest import Tab
from tests.support.adapter_double import adapter_files, zip_of
from tests.support.hub_double import HubDouble
from tests.support.server import StudioServer, start_server
from tests.support.tiny_model import TINY_ID

HOSTILE = "<img src=x onerror=alert(1)>"
GOOD = json.dumps({"prompt": HOSTILE, "completion": "an answer"})


@pytest.fixture(scope="module")
def hub() -> Iterator[HubDouble]:
    """A Hub of the module's own."""
    with HubDouble() as double:
        yield double


@pytest.fixture(scope="module")
def server(hub: HubDouble, tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    """A server that asks that Hub."""
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": ""}
    with start_server(home, model_dirs, **environment) as server:
        yield server


def test_a_file_is_refused_by_its_lines_and_taken_without_them(tab: Tab) -> None:
    tab.refusals_are_meant = True
    page = tab.open("/datasets")
    tab.accessible()
    content = f"{GOOD}\n{{}}\n{GOOD}\n".encode()
    file = FilePayload(name=f"{HOSTILE}.jsonl", mimeType="application/jsonl", buffer=content)
    page.get_by_label("Drop a file here, or choose one").set_input_files(file)
    expect(page.get_by_role("listitem").filter(has_text="Line 2:")).to_be_visible()
    tab.accessible()
    page.get_by_role("button", name="Leave those rows out and keep 2").click()
    expect(page.get_by_text("1 rows were left out: line 2")).to_be_visible()
    rows = page.get_by_role("region", name="Rows")
    expect(rows.locator("article")).to_have_count(2)
    expect(rows.locator("article mark").first).to_have_text("an answer")
    page.get_by_label("Row to show").fill("2")
    page.get_by_role("button", name="Look").click()
    expect(page.get_by_role("heading", name="Row 2 as the model sees it")).to_be_visible()
    expect(page.locator("#analysis mark")).to_contain_text("an answer")
    expect(page.locator("img[src=x]")).to_have_count(0)
    tab.accessible()


def test_an_import_from_the_hub_can_be_cancelled_and_becomes_a_dataset(tab: Tab, hub: HubDouble) -> None:
    under_way = '<div class="card"><strong>owner/rows</strong><button type="button">Cancel</button></div>'
    held: list[Route] = []
    page = tab.open("/datasets")
    page.route("**/datasets/imports", lambda route: route.fulfill(content_type="text/html", body=under_way))
    page.route("**/api/datasets", lambda route: held.append(route))
    page.get_by_label("Dataset", exact=True).fill("owner/rows")
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    body = json.dumps({"title": "Import cancelled", "detail": "The import of owner/rows was cancelled.", "status": 409})
    page.unroute("**/datasets/imports")
    tab.refusals_are_meant = True
    held[0].fulfill(status=409, content_type="application/problem+json", body=body)
    expect(page.get_by_text("The import of owner/rows was cancelled.")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    hub.add_dataset("someone/rows", {"train.jsonl": f"{GOOD}\n".encode()})
    page.unroute("**/api/datasets")
    page.get_by_label("Dataset", exact=True).fill("someone/rows")
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_role("region", name="Rows").locator("article mark")).to_have_text("an answer")


def test_rows_are_leafed_through_and_a_dataset_goes_with_the_runs_that_learned_from_it(
    open_tab: Callable[..., Tab], server: StudioServer
) -> None:
    dataset = server.upload(f"{GOOD}\n" * 12, name="twelve")
    job = server.submit(model_id=TINY_ID, dataset_id=dataset["id"], name=HOSTILE, overrides={"max_steps": 1000})
    server.http.post(f"/api/training/jobs/{job['id']}/cancel")
    server.wait_for_state(job["id"], "cancelled")
    tab = open_tab(server, color_scheme="dark", viewport={"width": 360, "height": 720})
    page = tab.open(f"/datasets/{dataset['id']}")
    page.get_by_role("link", name="Later").click()
    expect(page.get_by_text("11 to 12 of 12")).to_be_visible()
    page.go_back()
    expect(page.get_by_text("1 to 10 of 12")).to_be_visible()
    tab.accessible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
    page.get_by_role("button", name="Keep").click()
    assert server.http.get(f"/api/datasets/{dataset['id']}").status_code == 200
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/datasets")
    assert server.http.get(f"/api/datasets/{dataset['id']}").status_code == 404
    assert server.http.get(f"/api/training/jobs/{job['id']}").status_code == 404


def test_an_adapter_comes_in_by_a_zip_and_is_exported_cancelled_and_deleted(tab: Tab) -> None:
    page, server = tab.open("/adapters"), tab.server
    tab.accessible()
    content = zip_of(adapter_files())
    file = FilePayload(name=f"{HOSTILE}.zip", mimeType="application/zip", buffer=content)
    page.get_by_label("Drop a zip of an adapter's folder here, or choose one").set_input_files(file)
    page.wait_for_url("**/adapters/adp_*")
    adapter_id = page.url.rpartition("/")[2]
    expect(page.get_by_role("heading", level=1)).to_contain_text(HOSTILE)
    expect(page.get_by_label("With the openai library, from this server")).to_contain_text('model="ft:tests/tiny-llama')
    page.get_by_role("button", name="GGUF q8_0").click()
    export = page.locator(".export")
    export.get_by_role("button", name="Cancel").click()
    expect(export.locator(".state-cancelled")).to_be_visible()
    tab.accessible()
    export.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(export).to_have_count(0)
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/adapters")
    assert server.http.get(f"/api/adapters/{adapter_id}").status_code == 404


def test_an_adapter_of_the_hub_is_refused_in_its_form_or_comes_in(
    open_tab: Callable[..., Tab], server: StudioServer, hub: HubDouble
) -> None:
    hub.add_model("someone/pickled", {"adapter_model.bin": b"x", "adapter_config.json": b"{}"})
    hub.add_model("someone/mine", adapter_files())
    tab = open_tab(server, color_scheme="dark", viewport={"width": 360, "height": 720})
    tab.refusals_are_meant = True
    page = tab.open("/adapters")
    page.get_by_label("A repository of the Hub").fill("someone/pickled")
    page.get_by_role("button", name="Import").click()
    expect(page.locator(".refusal")).to_be_visible()
    page.get_by_label("A repository of the Hub").fill("someone/mine")
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_role("list").get_by_text("Brought in")).to_be_visible()
    tab.accessible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_model_of_the_hub_is_found_judged_and_its_load_is_cancelled(
    tab: Tab, hub: HubDouble, tiny_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_path.iterdir() if path.is_file()}
    hub.add_model("someone/tiny", files, pipeline_tag="text-generation")
    page = tab.open("/models")
    page.get_by_label("Words of the model's name").fill("someone/tiny")
    page.get_by_role("link", name="someone/tiny").click()
    expect(page.locator(".fit-line").first).to_contain_text("fits")
    tab.accessible()
    page.get_by_role("button", name="Download and load").click()
    expect(page.get_by_role("heading", name="Loading someone/tiny")).to_be_visible()
    tab.accessible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Download and load")).to_be_visible()
    loaded = tab.server.http.get("/api/peft/loaded-models").json()["models"]
    assert "someone/tiny" not in [model["model_id"] for model in loaded]


def test_a_downloaded_model_is_deleted_once_it_is_not_in_memory(tab: Tab, hub: HubDouble, tiny_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_path.iterdir() if path.is_file()}
    hub.add_model("someone/else", files, pipeline_tag="text-generation")
    server = tab.server
    loaded = server.load("someone/else")
    refused = server.http.delete("/api/models/someone/else", params={"force": True})
    assert (refused.status_code, refused.json()["loaded_models"]) == (409, [loaded["id"]])
    page = tab.open("/models/someone/else")
    expect(page.get_by_text("it is in memory")).to_be_visible()
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)
    page.get_by_role("button", name="Unload").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog")).to_contain_text("which other programs use, too")
    tab.accessible()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/models")
    expect(page.get_by_role("link", name="someone/else")).to_have_count(0)
    assert server.http.delete("/api/models/someone/else").status_code == 404
    assert not (server.home / "hf" / "hub" / "models--someone--else").exists()
