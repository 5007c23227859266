import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

from core import errors
from domain.hub.repos import model_repo
from services.hub.download_flight import DownloadCancelled, Progress
from services.hub.downloads import Downloads
from services.hub.file_transfer import DownloadCorrupt
from services.hub.snapshot_spec import SnapshotSpec
from services.models.snapshot_specs import MODEL, PICKLED_MODEL
from tests.support.hub_double import HubDouble, ManualClock, quiet_environment, safetensors_bytes
from tests.support.registries import make_downloads

WEIGHTS = safetensors_bytes({"w": ("BF16", (64, 64))})
FILES = {
    "config.json": json.dumps({"model_type": "llama", "num_hidden_layers": 2}).encode(),
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": WEIGHTS,
    "README.md": b"# not needed",
    "pytorch_model.bin": b"pickled",
    "onnx/model.onnx": b"not needed",
    "modeling.py": b"import os",
}
WANTED = {"config.json", "tokenizer.json", "model.safetensors"}
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


class Bench:
    """Downloads from a double into a cache of its own."""

    def __init__(self, hub: HubDouble, folder: Path) -> None:
        self.hub, self.folder, self.root = hub, folder, folder / "hub"
        self.clock = ManualClock()
        self.free_bytes = 2**40

    def downloads(self, **more: Any) -> Downloads:
        """Make them as a fresh process would."""
        return make_downloads(self.hub, self.folder, self.clock, free_bytes=lambda _: self.free_bytes, **more)

    def fetch(self, model_id: str = "me/m", revision: str | None = None, spec: SnapshotSpec = MODEL) -> Path:
        return self.downloads().fetch(model_repo(model_id), revision, lambda _: None, lambda: False, spec=spec)

    def blobs(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("models--*/blobs/*"))

    def ranges(self) -> list[str | None]:
        return [seen.headers.get("Range") for seen in self.hub.seen if seen.route == "cdn"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    quiet_environment(monkeypatch, tmp_path)
    with HubDouble() as hub:
        yield Bench(hub, tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_load_reads_is_fetched_and_nothing_else(bench: Bench) -> None:
    commit = bench.hub.add_model("me/m", FILES)
    folder = bench.fetch()

    assert folder == bench.root / "models--me--m" / "snapshots" / commit
    assert content(folder) == {name: FILES[name] for name in WANTED}
    assert (bench.root / "models--me--m" / "refs" / "main").read_text() == commit


def test_it_is_the_hubs_own_cache(bench: Bench) -> None:
    """What is fetched here huggingface_hub finds, and what it fetched is not fetched again."""
    commit = bench.hub.add_model("me/m", FILES)
    bench.fetch()
    (repo,) = scan_cache_dir(bench.root).repos
    assert (repo.repo_id, [revision.commit_hash for revision in repo.revisions]) == ("me/m", [commit])
    assert Path(hf_hub_download("me/m", "config.json", cache_dir=bench.root, local_files_only=True)).is_file()

    bench.hub.add_model("me/n", FILES | {"config.json": b'{"model_type": "other"}'})
    snapshot_download("me/n", endpoint=bench.hub.url, cache_dir=bench.root)
    before = bench.hub.requests["cdn"]
    assert set(content(bench.fetch("me/n"))) >= WANTED
    assert bench.hub.requests["cdn"] == before


def test_a_pinned_commit_that_is_here_in_part_is_completed(bench: Bench) -> None:
    commit = bench.hub.add_model("me/m", FILES)
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("me/m", name, endpoint=bench.hub.url, cache_dir=bench.root)
    fetched = bench.hub.requests["cdn"]

    assert content(bench.fetch(revision=commit)) == {name: FILES[name] for name in WANTED}
    assert bench.hub.requests["cdn"] == fetched


def test_a_pinned_commit_that_is_here_asks_nobody(bench: Bench) -> None:
    commit = bench.hub.add_model("me/m", FILES)
    first = bench.fetch(revision=commit)
    before = bench.hub.requests.total()

    assert bench.fetch(revision=commit) == first
    assert bench.hub.requests.total() == before


def test_a_branch_that_is_here_is_served_while_the_hub_is_away(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    first = bench.fetch()
    bench.hub.fail("info", status=503, times=99)

    assert bench.fetch() == first
    with pytest.raises(errors.HubUnavailable):
        bench.fetch(revision="other")


def test_a_tree_of_many_pages_is_read_whole(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.tree_page = 2
    assert set(content(bench.fetch())) == WANTED
    assert bench.hub.requests["tree"] == 4


def test_a_renamed_model_is_fetched(bench: Bench) -> None:
    bench.hub.add_model("new/name", FILES)
    bench.hub.rename("me/m", "new/name")
    assert set(content(bench.fetch())) == WANTED


def test_a_renamed_model_of_many_pages_is_read_whole(bench: Bench) -> None:
    bench.hub.add_model("new/name", FILES)
    bench.hub.rename("me/m", "new/name")
    bench.hub.tree_page = 2
    assert set(content(bench.fetch())) == WANTED
    listed = [seen.query for seen in bench.hub.seen if seen.route == "tree" and "new" in seen.path]
    assert [query["recursive"] for query in listed] == [["true"]] * 4


# Content


@pytest.mark.parametrize("route", ["cdn", "resolve"])
@pytest.mark.parametrize("kind", ["flip", "long"])
def test_content_that_is_not_the_hubs_is_fetched_again(bench: Bench, route: Any, kind: str) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail(route, kind)
    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert all(".incomplete" not in name for name in bench.blobs())


@pytest.mark.parametrize("kind", ["flip", "long"])
def test_content_that_stays_wrong_is_never_handed_out(bench: Bench, kind: str) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", kind, times=99)
    with pytest.raises(DownloadCorrupt, match=r"model\.safetensors"):
        bench.fetch()

    assert bench.hub.requests["cdn"] == 2
    assert SHA256 not in bench.blobs()
    bench.hub.recover()
    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, len(WEIGHTS) - 1),
        lambda path: path.write_bytes(WEIGHTS[:-1] + b"\x01"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_blob_is_found_and_mended(bench: Bench, damage: Callable[[Path], None]) -> None:
    commit = bench.hub.add_model("me/m", FILES)
    folder = bench.fetch(revision=commit)
    damage((folder / "model.safetensors").resolve())

    assert (bench.fetch(revision=commit) / "model.safetensors").read_bytes() == WEIGHTS
    assert bench.hub.requests["cdn"] == 2


def test_a_blob_is_read_whole_once_and_again_after_a_change(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = bench.hub.add_model("me/m", FILES)
    folder = bench.fetch(revision=commit)
    blob = (folder / "model.safetensors").resolve()
    cache = bench.downloads().cache
    status = blob.stat()
    blob.write_bytes(WEIGHTS[:-1] + b"\x01")
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))  # as one would who wants it not to be noticed
    assert cache.damaged(folder) == [blob]

    blob.write_bytes(WEIGHTS)
    assert cache.damaged(folder) == []
    monkeypatch.setattr("services.hub.cache_dir.content_hash", lambda *_: pytest.fail("read again"))
    assert cache.damaged(folder) == []


# Breaks


@pytest.mark.parametrize("kind", ["cut", "short"])
def test_a_break_is_resumed_where_it_was(bench: Bench, kind: str) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", kind)
    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert bench.ranges() == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_a_download_is_resumed_by_the_next_process(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "cut", times=5)
    for _ in range(5):
        bench.hub.fail("cdn", "cut")
    with pytest.raises(errors.HubUnavailable):
        bench.fetch()
    held = (bench.root / "models--me--m" / "blobs" / f"{SHA256}.peft-studio.incomplete").stat().st_size
    assert 0 < held < len(WEIGHTS)
    bench.hub.recover()
    del bench.hub.seen[:]

    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert bench.ranges() == [f"bytes={held}-"]


@pytest.mark.parametrize("stale", [b"x" * 10, b"x" * len(WEIGHTS), b"x" * (len(WEIGHTS) + 5), b""])
def test_a_partial_file_of_something_else_is_given_up(bench: Bench, stale: bytes) -> None:
    bench.hub.add_model("me/m", FILES)
    blobs = bench.root / "models--me--m" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{SHA256}.peft-studio.incomplete").write_bytes(stale)

    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_host_that_ignores_ranges_is_read_from_the_beginning(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "cut")
    bench.hub.fail("cdn", status=200, body=WEIGHTS)
    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_range_that_the_host_does_not_have_begins_anew(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "cut")
    bench.hub.fail("cdn", status=416)
    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert bench.ranges()[-1] is None


def test_errors_that_pass_are_waited_out_as_told(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", status=429, headers={"RateLimit": '"resolvers";r=0;t=55'})
    bench.hub.fail("cdn", status=503, headers={"Retry-After": "7"})
    bench.fetch()
    assert sum(bench.clock.slept_s) == 62


def test_a_pause_longer_than_the_hubs_window_is_told(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(errors.HubUnavailable) as caught:
        bench.fetch()
    assert caught.value.extras == {"retry_after_s": 3600.0}


def test_a_host_that_hangs_is_given_up(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "hang", times=5)
    with pytest.raises(errors.HubUnavailable, match="ReadTimeout"):
        bench.downloads(timeout_s=0.05).fetch(model_repo("me/m"), None, lambda _: None, lambda: False, spec=MODEL)
    assert bench.hub.requests["cdn"] == 5


# Once, progress, cancelling


def test_however_many_ask_it_is_downloaded_once(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    downloads = bench.downloads()
    bench.hub.fail("cdn", "stall")
    with ThreadPoolExecutor(20) as pool:
        waiting = threading.Barrier(21)

        def ask() -> Path:
            met = False

            def seen(_: Progress) -> None:
                nonlocal met
                if not met:
                    met = True
                    waiting.wait(600)

            return downloads.fetch(model_repo("me/m"), None, seen, lambda: False, spec=MODEL)

        asked = [pool.submit(ask) for _ in range(20)]
        waiting.wait(600)  # all of them have seen the one download's progress
        bench.hub.release()
        folders = {one.result(600) for one in asked}

    assert len(folders) == 1
    assert {route: bench.hub.requests[route] for route in ("info", "tree", "resolve", "cdn")} == {
        "info": 1,
        "tree": 1,
        "resolve": 3,
        "cdn": 1,
    }


def test_progress_tells_bytes_and_speed(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "stall")
    total = sum(len(FILES[name]) for name in WANTED)
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        bench.clock.advance(1)
        if progress.done_bytes >= total - len(WEIGHTS) // 2:
            bench.hub.release()

    bench.downloads().fetch(model_repo("me/m"), None, watch, lambda: False, spec=MODEL)

    assert {progress.total_bytes for progress in seen} == {total}
    assert [progress.done_bytes for progress in seen] == sorted(progress.done_bytes for progress in seen)
    assert seen[-1].bytes_per_s is None or seen[-1].bytes_per_s >= 0


def test_a_cancelled_download_stops_and_is_resumed_later(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "stall")
    with pytest.raises(DownloadCancelled):
        bench.downloads().fetch(model_repo("me/m"), None, lambda _: None, bench.hub.stalled.is_set, spec=MODEL)
    bench.hub.release()

    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert bench.ranges()[-1] == f"bytes={len(WEIGHTS) // 2}-"


def test_a_host_that_drips_is_listened_to_and_can_be_left(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "drip", times=2)
    arrived: list[int] = []

    def enough() -> bool:
        return bool(arrived) and arrived[-1] > len(FILES["config.json"]) + len(FILES["tokenizer.json"])

    with pytest.raises(DownloadCancelled):
        bench.downloads().fetch(
            model_repo("me/m"), None, lambda progress: arrived.append(progress.done_bytes), enough, spec=MODEL
        )
    bench.hub.release()
    assert (bench.fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_who_still_waits_gets_what_another_has_cancelled(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.fail("cdn", "stall")
    downloads = bench.downloads()
    joined = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        stays = pool.submit(
            downloads.fetch, model_repo("me/m"), None, lambda _: joined.set(), lambda: False, spec=MODEL
        )
        assert joined.wait(600)
        with pytest.raises(DownloadCancelled):
            downloads.fetch(model_repo("me/m"), None, lambda _: None, lambda: True, spec=MODEL)
        bench.hub.release()
        assert (stays.result(600) / "model.safetensors").read_bytes() == WEIGHTS


# Refusals


def test_a_device_without_room_is_told_before_anything_is_written(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.free_bytes = 100
    with pytest.raises(errors.StorageFull) as caught:
        bench.fetch()

    assert caught.value.extras == {"needed_bytes": sum(len(FILES[name]) for name in WANTED), "free_bytes": 100}
    assert bench.blobs() == []
    assert bench.hub.requests["resolve"] == 0


@pytest.mark.parametrize("step", ["write", "move_to"])
def test_a_device_that_fills_up_is_told_and_what_arrived_is_removed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bench.hub.add_model("me/m", FILES)
    monkeypatch.setattr(f"services.hub.cache_dir.Partial.{step}", full)
    with pytest.raises(errors.StorageFull):
        bench.fetch()
    assert bench.blobs() == []


@pytest.mark.parametrize(
    "path",
    [
        "../../x",
        "a/../../x",
        "/etc/x",
        "..",
        "a//b",
        "./a",
        "a\\..\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "",
        "x" * 256,
        "\u202ex",
    ],
)
def test_a_tree_that_leaves_the_repository_is_refused_whole(bench: Bench, path: str) -> None:
    bench.hub.add_model("me/m", FILES)
    bench.hub.lie_about_tree("me/m", {"type": "file", "path": path, "oid": "0" * 40, "size": 1})
    before = sorted(bench.folder.rglob("*"))
    with pytest.raises(errors.ModelRejected):
        bench.fetch()

    assert sorted(bench.folder.rglob("*")) == before
    assert bench.hub.requests["resolve"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"oid": "../../../x"},
        {"oid": None},
        {"size": -1},
        {"size": "9"},
        {"lfs": {"oid": "../x", "size": 1}},
        {"lfs": {"size": 1}},
        {"path": "config.json"},
    ],
)
def test_an_entry_that_is_none_is_refused(bench: Bench, change: dict[str, Any]) -> None:
    bench.hub.add_model("me/m", FILES)
    entry = {"type": "file", "path": "more.json", "oid": "0" * 40, "size": 1}
    bench.hub.lie_about_tree("me/m", entry | change)
    with pytest.raises(errors.ModelRejected):
        bench.fetch()
    assert bench.hub.requests["resolve"] == 0


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"config.json": b'{"auto_map": {"AutoModel": "modeling.Evil"}}'}, errors.NeedsRemoteCode),
        ({"config.json": b'{"text_config": {"auto_map": {"AutoModel": "m.E"}}}'}, errors.NeedsRemoteCode),
        ({"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["t.Evil", null]}}'}, errors.NeedsRemoteCode),
        ({"generation_config.json": b'{"auto_map": {"x": "y"}}'}, errors.NeedsRemoteCode),
        ({"config.json": b'{"attn_implementation": "someone/kernel"}'}, errors.NeedsRemoteCode),
        ({"config.json": b'{"_attn_implementation": {"": "someone/kernel"}}'}, errors.NeedsRemoteCode),
        ({"config.json": b'{"text_config": {"_experts_implementation": "a/b"}}'}, errors.NeedsRemoteCode),
        ({"config.json": b'{"num_hidden_layers": 10000000}'}, errors.ModelRejected),
        ({"config.json": b'{"text_config": {"num_hidden_layers": 10000000}}'}, errors.ModelRejected),
        ({"config.json": b'{"num_hidden_layers": -1}'}, errors.ModelRejected),
        ({"config.json": b"[]"}, errors.ModelRejected),
        ({"config.json": b"{"}, errors.ModelRejected),
    ],
)
def test_what_may_not_be_loaded_is_refused_before_its_weights(
    bench: Bench, files: dict[str, bytes], error: type[errors.StudioError]
) -> None:
    bench.hub.add_model("me/m", FILES | files)
    with pytest.raises(error):
        bench.fetch()
    assert bench.hub.requests["cdn"] == 0


def test_pickled_weights_are_refused_unless_asked_for(bench: Bench) -> None:
    files = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    bench.hub.add_model("me/m", files)
    with pytest.raises(errors.NoSafeWeights):
        bench.fetch()
    assert bench.blobs() == []

    assert "pytorch_model.bin" in content(bench.fetch(spec=PICKLED_MODEL))


def test_safetensors_are_taken_even_where_pickled_weights_would_do(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    assert set(content(bench.fetch(spec=PICKLED_MODEL))) == WANTED


def test_of_sharded_weights_all_shards_and_their_index_are_fetched(bench: Bench) -> None:
    shards = {f"model-0000{number}-of-00002.safetensors": WEIGHTS + bytes([number]) for number in (1, 2)}
    index = {"model.safetensors.index.json": b"{}", "pytorch_model.bin.index.json": b"{}"}
    files = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    more = {"consolidated.safetensors": b"twice", "additional_chat_templates/tool.jinja": b"x"}
    bench.hub.add_model("me/m", files | shards | index | more)
    assert set(content(bench.fetch())) == {
        *("config.json", "tokenizer.json", "model.safetensors.index.json", "additional_chat_templates/tool.jinja"),
        *shards,
    }


# Access


def test_a_gated_model_is_fetched_by_who_may(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hub.add_model("me/m", FILES, gated="manual", granted=("hf_valid",))
    with pytest.raises(errors.ModelGated):
        bench.fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_valid")

    assert set(content(bench.fetch())) == WANTED
    assert all("Authorization" not in seen.headers for seen in bench.hub.seen if seen.route == "cdn")
    assert all(b"hf_valid" not in path.read_bytes() for path in bench.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("token", [None, "hf_valid"])
def test_what_does_not_exist_is_not_found(bench: Bench, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(errors.ModelNotFound):
        bench.fetch("me/absent")


def test_a_token_revoked_during_the_download_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hub.add_model("me/m", FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    bench.hub.fail("tree", status=503)
    monkeypatch.setattr(bench.clock, "sleep", lambda _: bench.hub.revoke("hf_valid"))
    with pytest.raises(errors.AccessDenied, match="HF_TOKEN"):
        bench.fetch()


def test_a_disabled_model_is_refused(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, disabled=True)
    with pytest.raises(errors.AccessDenied, match="disabled"):
        bench.fetch()
