"""Datasets from the Hub's double and from a folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core import errors
from services.dataset_service import DatasetService
from services.datasets.hub_files import HubDatasets
from services.datasets.read_settings import ReadSettings
from services.datasets.sources import DatasetSources
from store.records import DatasetRecord
from tests.support.datasets_double import as_jsonl, as_parquet, dataset_service, gzipped, left_in, rows_of
from tests.support.hub_double import RATE_LIMITED, HubDouble, ManualClock
from tests.support.registries import make_downloads

AUTO = ReadSettings(None, {}, "reject", None, None)
TRAIN = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(6)]
TEST = [{"question": "q", "answer": "a"}]
CARD = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/*.parquet\n---\n# Data\n"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DatasetService]:
    with dataset_service(tmp_path) as made:
        yield made


@pytest.fixture
def sources(hub: HubDouble, service: DatasetService, tmp_path: Path) -> DatasetSources:
    (tmp_path / "imports").mkdir()
    fetched = HubDatasets(make_downloads(hub, tmp_path, ManualClock()), 2**20)
    return DatasetSources(service, fetched, tmp_path / "imports", 2**20)


def bring(sources: DatasetSources, hub_id: str = "someone/sums", **more: Any) -> DatasetRecord:
    values = {"revision": None, "config": None, "split": None, "name": "", "settings": AUTO} | more
    return sources.from_hub(hub_id, **values)


def questions(service: DatasetService, record: DatasetRecord) -> list[str]:
    return [row["messages"][0]["content"] for row in rows_of(service, record.id)]


def test_the_files_of_a_split_become_one_dataset(
    hub: HubDouble, service: DatasetService, sources: DatasetSources
) -> None:
    files = {f"main/{n}.parquet": as_parquet(TRAIN[n * 3 : n * 3 + 3]) for n in range(2)}
    sha = hub.add_dataset("someone/sums", {**files, "README.md": CARD, "other/x.jsonl": b"{}"})
    record = bring(sources)
    assert (record.name, record.format, questions(service, record)) == (
        "someone/sums",
        "prompt_completion",
        [f"q{n}" for n in range(6)],
    )
    source = service.manifest(record.id).source
    assert (source["sha"], source["config"], source["split"], source["files"]) == (sha, "main", "train", list(files))
    assert [file.name for file in service.manifest(record.id).files] == list(files)
    zipped = b"".join(service.download(record.id, "original").content)  # type: ignore[arg-type]
    assert all(content in zipped for content in files.values())
    assert not any(name.endswith("hub") or ".tmp" in name for name in left_in(service.folder(record.id).parent))
    resolved = [seen.path for seen in hub.seen if seen.route == "resolve"]
    assert not any("other" in path for path in resolved)


def test_revision_config_and_split_are_what_was_asked_for(
    hub: HubDouble, service: DatasetService, sources: DatasetSources
) -> None:
    hub.add_dataset("sums", {"train.jsonl": as_jsonl(TEST)})
    old = {f"{config}/{split}/0.jsonl.gz": gzipped(as_jsonl(TRAIN)) for config in "ab" for split in ("train", "test")}
    hub.add_dataset("sums", old | {"b/test/0.jsonl.gz": gzipped(as_jsonl(TEST * 2))}, revision="refs/convert/parquet")
    assert bring(sources, "sums").rows == 1
    assert bring(sources, "sums", revision="refs/convert/parquet", config="b", split="test").rows == 2
    with pytest.raises(errors.DatasetRejected, match="more than one configuration"):
        bring(sources, "sums", revision="refs/convert/parquet")
    with pytest.raises(errors.DatasetNotFound, match="no such revision"):
        bring(sources, "sums", revision="nowhere")


def test_what_the_hub_refuses_is_told_of_a_dataset(
    hub: HubDouble, service: DatasetService, sources: DatasetSources
) -> None:
    before = left_in(service._files._folder)
    hub.add_dataset("someone/gated", {"train.jsonl": as_jsonl(TEST)}, gated="auto")
    with pytest.raises(errors.DatasetGated, match="accept its terms"):
        bring(sources, "someone/gated")
    with pytest.raises(errors.DatasetNotFound, match="no dataset nobody/nothing"):
        bring(sources, "nobody/nothing")
    hub.add_dataset("someone/scripted", {"scripted.py": b"print()"})
    with pytest.raises(errors.DatasetRejected, match="script"):
        bring(sources, "someone/scripted")
    hub.add_dataset("someone/large", {"train.jsonl": b"x" * (2**20 + 1)})
    with pytest.raises(errors.TooLarge):
        bring(sources, "someone/large")
    hub.add_dataset("someone/broken", {"train.jsonl": b"{broken"})
    with pytest.raises(errors.DatasetRejected, match="not JSON"):
        bring(sources, "someone/broken")
    hub.add_dataset("someone/evil", {"../../train.jsonl": as_jsonl(TEST)})
    with pytest.raises(errors.DatasetRejected, match="no path in a repository"):
        bring(sources, "someone/evil")
    hub.add_dataset("someone/sums", {"train.jsonl": as_jsonl(TEST)})
    hub.fail("info", "status", 9, status=429, headers=RATE_LIMITED)
    with pytest.raises(errors.HubUnavailable) as caught:
        bring(sources, "someone/sums")
    assert caught.value.extras["retry_after_s"] == 55
    assert left_in(service._files._folder) == before
    assert service.imports.all() == []


# Folders


def test_a_file_and_a_folder_are_copied_in(service: DatasetService, sources: DatasetSources, tmp_path: Path) -> None:
    folder = tmp_path / "imports" / "sums"
    (folder / "data").mkdir(parents=True)
    for n in range(2):
        (folder / "data" / f"train-{n}.jsonl").write_bytes(as_jsonl(TRAIN[n * 3 : n * 3 + 3]))
    (folder / "test.jsonl").write_bytes(as_jsonl(TEST))
    record = sources.from_folder("sums", None, None, "", AUTO)
    assert (record.name, questions(service, record)) == ("sums", [f"q{n}" for n in range(6)])
    assert sources.from_folder("sums", None, "test", "t", AUTO).rows == 1
    assert sources.from_folder("sums/test.jsonl", None, None, "", AUTO).name == "test.jsonl"
    (folder / "test.jsonl").write_bytes(b"changed later")
    assert service.download(record.id, "normalised").content.exists()  # type: ignore[union-attr]
    with pytest.raises(errors.DatasetRejected, match=r"no split 'dev'"):
        sources.from_folder("sums", None, "dev", "", AUTO)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "link.jsonl", "linked", "loop", "a\0b", "../imports-evil"]
)
def test_nothing_outside_the_folder_is_taken(
    service: DatasetService, sources: DatasetSources, tmp_path: Path, path: str
) -> None:
    imports = tmp_path / "imports"
    for name in ("secret", "imports-evil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_bytes(as_jsonl(TEST))
    os.symlink(tmp_path / "secret" / "train.jsonl", imports / "link.jsonl")
    (imports / "linked").mkdir()
    os.symlink(tmp_path / "secret" / "train.jsonl", imports / "linked" / "train.jsonl")
    os.symlink("loop", imports / "loop")
    before = left_in(service._files._folder)
    with pytest.raises(errors.PathNotAllowed):
        sources.from_folder(path, None, None, "", AUTO)
    assert left_in(service._files._folder) == before


def test_what_is_not_there_is_not_found(sources: DatasetSources) -> None:
    with pytest.raises(errors.DatasetNotFound):
        sources.from_folder("nothing", None, None, "", AUTO)
