"""The files of a dataset on the Hub's double: resumed, checked, stopped, limited in time, and found again offline."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from core import errors
from services.datasets.hub_files import HubDatasets, HubFiles
from services.datasets.imports import Import, ImportCancelled, Imports
from services.hub.file_transfer import DownloadCorrupt
from services.hub.http import request_token
from tests.support.datasets_double import as_jsonl, as_parquet
from tests.support.hub_double import RATE_LIMITED, HubDouble, ManualClock
from tests.support.registries import make_downloads
from tests.support.server import wait_until

LARGE = as_parquet([{"prompt": f"question {n}", "completion": "a" * n} for n in range(200)])
SMALL = as_jsonl([{"prompt": "q", "completion": "a"}])
CARD = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/*.parquet\n---\n# Data\n"
FILES = {"README.md": CARD, "main/0.parquet": LARGE, "main/1.parquet": LARGE + b"x", "other/2.parquet": b"not wanted"}
PATHS = ("main/0.parquet", "main/1.parquet")
TOTAL_BYTES = sum(len(FILES[path]) for path in PATHS)
HALF_BYTES = sum(len(FILES[path]) // 2 for path in PATHS)  # what a double that stalls at both has sent


class Bench:
    """Fetches from the double into a cache of its own, each time as a fresh process would."""

    def __init__(self, hub: HubDouble, folder: Path) -> None:
        self.hub, self.folder, self.root = hub, folder, folder / "hub"
        self.clock = ManualClock()
        self.imports = Imports(self.clock)

    def fetch(self, hub_id: str = "me/data", revision: str | None = None, **more: Any) -> HubFiles:
        with self.imports.running(hub_id, "downloading", None) as progress:
            return self.fetch_as(progress, hub_id, revision, **more)

    def fetch_as(self, progress: Import, hub_id: str, revision: str | None = None, **more: Any) -> HubFiles:
        downloads = make_downloads(self.hub, self.folder, self.clock, **more)
        return HubDatasets(downloads, 2**20).fetch(hub_id, revision, None, None, progress)

    def blobs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.root.glob("datasets--*/blobs/*")}

    def ranges(self) -> list[str | None]:
        return [seen.headers.get("Range") for seen in self.hub.seen if seen.route == "cdn"]


@pytest.fixture
def bench(hub: HubDouble, tmp_path: Path) -> Iterator[Bench]:
    yield Bench(hub, tmp_path)


def is_whole(fetched: HubFiles) -> bool:
    return fetched.parts.paths == PATHS and all((fetched.folder / path).read_bytes() == FILES[path] for path in PATHS)


def test_what_the_split_needs_is_in_the_hubs_own_cache_and_nothing_else(bench: Bench) -> None:
    commit = bench.hub.add_dataset("me/data", FILES)
    fetched = bench.fetch()
    assert is_whole(fetched)
    assert fetched.folder == bench.root / "datasets--me--data" / "snapshots" / commit
    (repo,) = scan_cache_dir(bench.root).repos
    assert (repo.repo_type, repo.repo_id, [*repo.refs]) == ("dataset", "me/data", ["main"])
    names = {file.file_name for revision in repo.revisions for file in revision.files}
    assert names == {"README.md", "0.parquet", "1.parquet"}
    asked = bench.hub.requests.copy()
    assert (asked["info"], asked["tree"]) == (1, 1)

    assert is_whole(bench.fetch())  # what main is at is asked, and nothing more
    assert bench.hub.requests - asked == {"info": 1}
    assert is_whole(bench.fetch(revision=commit))
    assert bench.hub.requests.total() == asked.total() + 1


def test_the_clients_own_download_goes_on_with_ours_and_ours_with_its(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.fetch()
    before = bench.hub.requests.copy()
    more: dict[str, Any] = {"repo_type": "dataset", "endpoint": bench.hub.url, "cache_dir": bench.root}
    folder = Path(snapshot_download("me/data", **more))
    assert (folder / "other" / "2.parquet").read_bytes() == FILES["other/2.parquet"]
    assert bench.hub.requests["cdn"] == before["cdn"] + 1
    assert bench.hub.requests["tree"] == before["tree"]  # the listing that we kept is one that it reads

    bench.hub.add_dataset("me/theirs", FILES)
    snapshot_download("me/theirs", **more)
    before = bench.hub.requests.copy()
    assert is_whole(bench.fetch("me/theirs"))
    assert bench.hub.requests - before == {"info": 1}


# Content and breaks


def test_a_download_that_broke_off_goes_on_where_it_was(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.hub.fail("cdn", "cut")
    with pytest.raises(errors.HubUnavailable):
        bench.hub.fail("cdn", status=503, times=99)
        bench.fetch()
    held = [path.stat().st_size for path in bench.root.glob("datasets--me--data/blobs/*.incomplete")]
    assert sum(held) > 0
    bench.hub.recover()
    del bench.hub.seen[:]

    assert is_whole(bench.fetch())
    assert sorted(bench.ranges(), key=str) == sorted((f"bytes={size}-" if size else None for size in held), key=str)


@pytest.mark.parametrize(("route", "name"), [("cdn", "main/0.parquet"), ("resolve", "train.jsonl")])
@pytest.mark.parametrize("kind", ["flip", "long"])
def test_content_that_is_not_the_hubs_is_fetched_again_and_never_taken(
    bench: Bench, route: Any, name: str, kind: str
) -> None:
    files = {name: LARGE if name.endswith("parquet") else SMALL}
    bench.hub.add_dataset("me/data", files)
    bench.hub.fail(route, kind, times=99)
    if route == "cdn":
        bench.hub.fail("resolve", kind, times=0)
    with pytest.raises(DownloadCorrupt, match=name):
        bench.fetch()
    assert bench.hub.requests[route] == 2
    assert [content for content in bench.blobs().values() if content] == []
    assert list(bench.root.glob("datasets--me--data/snapshots/*/*")) == []

    bench.hub.recover()
    bench.hub.fail(route, kind)
    assert (bench.fetch().folder / name).read_bytes() == files[name]


def test_a_damaged_copy_is_found_and_mended(bench: Bench) -> None:
    commit = bench.hub.add_dataset("me/data", FILES)
    blob = (bench.fetch().folder / PATHS[0]).resolve()
    blob.write_bytes(LARGE[:-1] + b"\x00")
    assert is_whole(bench.fetch(revision=commit))


def test_a_device_without_room_is_told_before_anything_is_written(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", {"train.parquet": LARGE})
    with pytest.raises(errors.StorageFull) as caught:
        bench.fetch(free_bytes=lambda _: 100)
    assert caught.value.extras == {"needed_bytes": len(LARGE), "free_bytes": 100}
    assert not bench.root.exists()


def test_what_is_larger_than_a_dataset_may_be_is_not_fetched(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", {"train.jsonl": b"x" * (2**20 + 1)})
    with pytest.raises(errors.TooLarge):
        bench.fetch()
    assert not bench.root.exists()


# Cancel, progress, time limits


def test_a_cancelled_download_frees_who_waits_and_is_gone_on_with_later(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.hub.fail("cdn", "stall", times=2)
    with bench.imports.running("me/data", "downloading", None) as progress, ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(bench.fetch_as, progress, "me/data")
        wait_until(lambda: progress.received_bytes >= HALF_BYTES)
        bench.imports.cancel(progress.id)
        with pytest.raises(ImportCancelled):
            fetching.result(600)  # the double is still silent
    whole = {hashlib.sha256(FILES[path]).hexdigest() for path in PATHS}
    assert whole.isdisjoint(bench.blobs())
    assert [path.name for path in bench.root.glob("datasets--me--data/snapshots/*/*")] == ["README.md"]
    assert list(bench.root.glob("datasets--me--data/refs/*")) == []
    bench.hub.release()

    assert is_whole(bench.fetch())
    assert f"bytes={len(LARGE) // 2}-" in bench.ranges()


@pytest.mark.parametrize("route", ["info", "tree", "resolve"])
def test_a_cancel_does_not_wait_for_a_hub_that_hangs(bench: Bench, route: Any) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.hub.fail(route, "hang", times=99)
    with bench.imports.running("me/data", "downloading", None) as progress, ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(bench.fetch_as, progress, "me/data")
        wait_until(lambda: bench.hub.requests[route] > 0)
        progress.cancelled.set()
        with pytest.raises(ImportCancelled):
            fetching.result(600)
    bench.hub.recover()
    bench.hub.release()


@pytest.mark.parametrize("route", ["info", "tree", "resolve", "cdn"])
def test_a_hub_that_hangs_is_given_up(bench: Bench, route: Any) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.hub.fail(route, "hang", times=99)
    is_file = route in ("resolve", "cdn")
    limits: dict[str, Any] = {"timeout_s": 0.05} if is_file else {"answer_timeout_s": 0.05}
    with pytest.raises(errors.HubUnavailable, match="ReadTimeout"):
        bench.fetch(**limits)
    bench.hub.recover()
    bench.hub.release()
    bench.clock.advance(60)
    assert is_whole(bench.fetch())


def test_progress_counts_bytes_as_they_come(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.hub.fail("cdn", "stall", times=2)
    with bench.imports.running("me/data", "downloading", None) as progress, ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(bench.fetch_as, progress, "me/data")
        wait_until(lambda: progress.received_bytes >= HALF_BYTES)
        assert progress.total_bytes == TOTAL_BYTES
        bench.hub.release()
        assert is_whole(fetching.result(600))
        assert progress.received_bytes == TOTAL_BYTES


def test_two_who_ask_at_once_download_once(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.hub.fail("cdn", "stall", times=2)
    datasets = HubDatasets(make_downloads(bench.hub, bench.folder, bench.clock), 2**20)
    both = threading.Barrier(2)

    def ask() -> HubFiles:
        with bench.imports.running("me/data", "downloading", None) as progress:
            both.wait(600)
            return datasets.fetch("me/data", None, None, None, progress)

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask) for _ in range(2)]
        wait_until(lambda: sum(item.received_bytes > 0 for item in bench.imports.all()) == 2)
        bench.hub.release()
        assert all(is_whole(one.result(600)) for one in asked)
    assert bench.hub.requests["cdn"] == 2


# Without the Hub


def test_a_copy_in_the_cache_is_taken_offline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = bench.hub.add_dataset("me/data", FILES)
    bench.fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = bench.hub.requests.total()
    for revision in (None, "main", commit):
        fetched = bench.fetch(revision=revision)
        assert is_whole(fetched) and fetched.commit == commit
    for wrong in ({"revision": "other"}, {"hub_id": "me/absent"}):
        with pytest.raises(errors.HubUnavailable, match="HF_HUB_OFFLINE"):
            bench.fetch(**wrong)
    assert bench.hub.requests.total() == before


def test_a_copy_that_the_client_downloaded_is_taken_offline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hub.add_dataset("me/data", FILES)
    snapshot_download("me/data", repo_type="dataset", endpoint=bench.hub.url, cache_dir=bench.root)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_whole(bench.fetch())


def test_a_copy_in_part_is_no_dataset_and_it_is_said_what_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.hub.add_dataset("me/data", FILES)
    snapshot_download(
        "me/data",
        allow_patterns=["README.md", "main/0*"],
        repo_type="dataset",
        endpoint=bench.hub.url,
        cache_dir=bench.root,
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.HubUnavailable, match=r"only in part, without main/1\.parquet"):
        bench.fetch()


def test_a_branch_is_the_commit_that_was_last_fetched_whole(bench: Bench) -> None:
    old = bench.hub.add_dataset("me/data", FILES)
    bench.fetch()
    bench.hub.add_dataset("me/data", FILES | {"main/1.parquet": LARGE + b"y"})
    bench.hub.fail("cdn", status=404, times=99)
    with pytest.raises(errors.StudioError):
        bench.fetch()
    bench.hub.fail("info", status=503, times=99)
    assert bench.fetch().commit == old


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"{", b'{"format_version": 2, "files": {}}', b'{"format_version": 1, "files": {"../x": {}}}']
)
def test_a_listing_that_cannot_be_read_is_asked_for_again(bench: Bench, damage: bytes) -> None:
    commit = bench.hub.add_dataset("me/data", FILES)
    bench.fetch()
    (bench.root / "datasets--me--data" / "trees" / f"{commit}.json").write_bytes(damage)
    assert is_whole(bench.fetch())
    assert bench.hub.requests["tree"] == 2


# Access


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ({"gated": "auto"}, errors.DatasetGated),
        ({"gated": "manual"}, errors.DatasetGated),
        ({"private": True}, errors.DatasetNotFound),
        ({"disabled": True}, errors.AccessDenied),
    ],
)
def test_what_the_hub_refuses_is_an_error_as_for_models(
    bench: Bench, what: dict[str, Any], error: type[errors.StudioError]
) -> None:
    bench.hub.add_dataset("me/data", FILES, **what)
    with pytest.raises(error) as caught:
        bench.fetch()
    assert type(caught.value) is error
    assert bench.blobs() == {}


@pytest.mark.parametrize("token", [None, "hf_valid"])
def test_what_does_not_exist_is_not_found(bench: Bench, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    bench.hub.add_dataset("me/data", FILES)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(errors.DatasetNotFound, match="no dataset me/absent"):
        bench.fetch("me/absent")
    for revision in ("nowhere", "0" * 40):
        with pytest.raises(errors.DatasetNotFound, match="no such revision"):
            bench.fetch(revision=revision)
    with pytest.raises(errors.DatasetRejected, match="A dataset id is"):
        bench.fetch("me/a--b")


def test_a_renamed_dataset_is_fetched_page_by_page(bench: Bench) -> None:
    bench.hub.add_dataset("new/name", FILES)
    bench.hub.rename("datasets/me/data", "datasets/new/name")
    bench.hub.tree_page = 2
    assert is_whole(bench.fetch())


def test_the_requests_token_is_used_and_kept_nowhere(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", FILES, gated="manual", granted=("hf_valid",))
    reset = request_token.set("hf_valid")
    try:
        assert is_whole(bench.fetch())
    finally:
        request_token.reset(reset)
    assert {seen.headers.get("Authorization") for seen in bench.hub.seen if seen.route != "cdn"} == {"Bearer hf_valid"}
    assert all("Authorization" not in seen.headers for seen in bench.hub.seen if seen.route == "cdn")
    assert all(b"hf_valid" not in path.read_bytes() for path in bench.folder.rglob("*") if path.is_file())


def test_a_refused_token_is_said_to_be(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hub.add_dataset("me/data", FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(errors.AccessDenied, match="leave it out for public datasets"):
        bench.fetch()


def test_a_hub_that_asks_for_a_pause_is_told(bench: Bench) -> None:
    bench.hub.add_dataset("me/data", FILES)
    bench.hub.fail("tree", times=9, status=429, headers=RATE_LIMITED)
    with pytest.raises(errors.HubUnavailable) as caught:
        bench.fetch()
    assert caught.value.extras["retry_after_s"] == 55
