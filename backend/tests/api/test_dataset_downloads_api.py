"""Datasets of the Hub through a real server, the Hub being a double: killed, cancelled, refused, offline."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.datasets_double import as_parquet, left_in
from tests.support.hub_double import HubDouble
from tests.support.server import StudioServer, start_server, wait_until

# Of letters that cannot be packed, so that half of the file is more than what a process holds back in a buffer.
ROWS = [{"prompt": f"question {n}", "completion": random.Random(n).randbytes(500).hex()} for n in range(300)]
FILES = {"README.md": b"# Rows\n", "train.parquet": as_parquet(ROWS)}
HALF = len(FILES["train.parquet"]) // 2
BODY = {"hub_id": "me/rows"}


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    with HubDouble() as double:
        double.add_dataset("me/rows", FILES)
        yield double


def environment(hub: HubDouble, folder: Path) -> dict[str, str]:
    return {
        **{"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf")},
        "PEFT_STUDIO_CACHE_DIR": str(folder / "cache"),
    }


@pytest.fixture
def studio(hub: HubDouble, tmp_path: Path) -> Iterator[StudioServer]:
    with start_server(tmp_path / "home", tmp_path / "models", **environment(hub, tmp_path)) as server:
        yield server


def bring(studio: StudioServer, body: dict[str, Any] = BODY, **headers: str) -> httpx.Response:
    return studio.http.post("/api/datasets", json=body, headers=headers)


def running(studio: StudioServer) -> dict[str, Any]:
    """Return the one import, once half of it is here."""
    wait_until(
        lambda: (
            [item["received_bytes"] for item in studio.http.get("/api/datasets/imports").json()["imports"]] == [HALF]
        )
    )
    return dict(studio.http.get("/api/datasets/imports").json()["imports"][0])


def test_a_download_that_a_killed_server_left_is_taken_up_where_it_was(
    hub: HubDouble, studio: StudioServer, tmp_path: Path
) -> None:
    hub.fail("cdn", "stall")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(bring, studio)
        shown = running(studio)
        told = (shown["stage"], shown["name"], shown["total_bytes"])
        assert told == ("downloading", "me/rows", len(FILES["train.parquet"]))
        studio.kill()
        assert isinstance(asked.exception(60), httpx.TransportError)
    hub.release()
    held = sum(path.stat().st_size for path in (tmp_path / "hf").rglob("*.incomplete"))
    assert 0 < held <= HALF
    with start_server(studio.home, tmp_path / "models", **environment(hub, tmp_path)) as again:
        assert [name for name in left_in(again.home / "datasets") if "tmp" in name] == []
        response = bring(again)
        assert (response.status_code, response.json()["rows"]) == (201, len(ROWS)), response.text
        stored = again.http.get(f"/api/datasets/{response.json()['id']}/download").content
        assert stored == FILES["train.parquet"]
    assert [seen.headers.get("Range") for seen in hub.seen if seen.route == "cdn"] == [None, f"bytes={held}-"]


def test_a_cancel_frees_the_request_at_once_and_leaves_nothing_half_made(
    hub: HubDouble, studio: StudioServer, tmp_path: Path
) -> None:
    before = left_in(studio.home / "datasets")
    hub.fail("cdn", "stall")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(bring, studio)
        shown = running(studio)
        cancelled = studio.http.post(f"/api/datasets/imports/{shown['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["id"]) == (202, shown["id"])
        response = asked.result(600)  # the double sends nothing meanwhile
    assert (response.status_code, response.json()["type"]) == (409, "/problems/import-cancelled")
    assert studio.http.get("/api/datasets/imports").json() == {"imports": []}
    assert studio.http.get("/api/datasets").json() == {"datasets": []}
    assert left_in(studio.home / "datasets") == before
    assert [path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")] == ["README.md"]
    gone = studio.http.post(f"/api/datasets/imports/{shown['id']}/cancel")
    assert (gone.status_code, gone.json()["type"]) == (404, "/problems/import-not-found")
    hub.release()
    assert bring(studio).json()["rows"] == len(ROWS)


def test_what_the_hub_does_not_do_is_a_problem_of_a_known_type(hub: HubDouble, studio: StudioServer) -> None:
    hub.add_dataset("me/gated", FILES, gated="auto", granted=("hf_valid",))
    hub.add_dataset("me/private", FILES, private=True)
    hub.add_dataset("me/disabled", FILES, disabled=True)
    hub.add_dataset("new/name", FILES)
    hub.rename("datasets/me/old", "datasets/new/name")
    for body, status, kind in (
        ({"hub_id": "me/gated"}, 403, "dataset-gated"),
        ({"hub_id": "me/private"}, 404, "dataset-not-found"),
        ({"hub_id": "me/disabled"}, 403, "access-denied"),
        ({"hub_id": "me/absent"}, 404, "dataset-not-found"),
        ({"hub_id": "me/rows", "revision": "nowhere"}, 404, "dataset-not-found"),
        ({"hub_id": "me/rows", "split": "nowhere"}, 422, "dataset-rejected"),
        ({"hub_id": "me/a--b"}, 422, "dataset-rejected"),
    ):
        response = bring(studio, body)
        assert (response.status_code, response.json()["type"]) == (status, f"/problems/{kind}"), response.text
    assert bring(studio, {"hub_id": "me/gated"}, **{"X-HF-Token": "hf_valid"}).status_code == 201
    assert bring(studio, {"hub_id": "me/old"}).status_code == 201
    hub.fail("cdn", "flip", times=99)
    hub.add_dataset("me/wrong", {"train.parquet": FILES["train.parquet"] + b"x"})
    response = bring(studio, {"hub_id": "me/wrong"})
    assert (response.status_code, response.json()["type"]) == (503, "/problems/download-corrupt")
    hub.fail("info", status=429, headers={"Retry-After": "55"})
    response = bring(studio)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "55")


def test_a_copy_in_the_cache_makes_a_dataset_offline(hub: HubDouble, studio: StudioServer, tmp_path: Path) -> None:
    first = bring(studio).json()
    studio.stop()
    offline = environment(hub, tmp_path) | {"HF_HUB_OFFLINE": "1"}
    with start_server(studio.home, tmp_path / "models", **offline) as again:
        response = bring(again)
        assert response.status_code == 201, response.text
        assert {name: response.json()[name] for name in ("sha256", "source", "rows")} == {
            name: first[name] for name in ("sha256", "source", "rows")
        }
        response = bring(again, {"hub_id": "me/absent"})
        assert (response.status_code, response.json()["type"]) == (503, "/problems/hub-unavailable")
