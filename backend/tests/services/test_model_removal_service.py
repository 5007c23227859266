"""Deleting a model: what goes, what stays, and what needs it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub import scan_cache_dir, snapshot_download

from core.errors import ModelNotFound, ModelRejected, PathNotAllowed
from domain.exports import MergedSettings
from domain.jobs.export_states import ExportKind, ExportState
from domain.jobs.states import JobState
from domain.peft.algorithms import Algorithm
from services.model_removal_service import ModelInUse, ModelRemovalService
from services.peft_service import LoadRequest, PeftService
from store.database import Database
from store.records import AdapterRecord, ExportRecord
from store.repositories import Adapters, Datasets, Exports, Jobs
from tests.support.hub_double import HubDouble
from tests.support.job_records import DATASET, MOMENT, job_record
from tests.support.little_memory import load

MODEL = "org/m"
ADAPTER = AdapterRecord("adp_1", "a", MODEL, None, "lora", None, None, None, {}, "/none", MOMENT, 1, {"kind": "upload"})
Fetch = Callable[..., Path]


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'studio.db'}")
    database.migrate()
    return database


@pytest.fixture
def removal(database: Database, peft: PeftService, tmp_path: Path) -> ModelRemovalService:
    dirs = [tmp_path / "operators"]
    return ModelRemovalService(database, peft, dirs, tmp_path / "prepared", lambda: tmp_path / "hub-cache")


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Return what downloads a model to the Hub's cache and returns its repository's folder there."""

    def fetch(model_id: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> Path:
        with HubDouble() as hub:
            hub.add_model(model_id, {"config.json": b"{}", "w.bin": model_id.encode()}, revision=revision or "main")
            cache = tmp_path / "hub-cache"
            snapshot_download(
                model_id, revision=revision, endpoint=hub.url, cache_dir=cache, allow_patterns=allow_patterns
            )
        return cache / f"models--{model_id.replace('/', '--')}"

    return fetch


def test_a_downloaded_model_goes_in_every_revision_and_others_stay(removal: ModelRemovalService, fetch: Fetch) -> None:
    folder, other = fetch(MODEL), fetch("org/other")
    fetch(MODEL, "dev")
    assert removal.use_of(MODEL).size_bytes >= 7
    removal.delete(MODEL)
    assert not folder.exists()
    assert [repo.repo_id for repo in scan_cache_dir(other.parent).repos] == ["org/other"]
    with pytest.raises(ModelNotFound):
        removal.delete(MODEL)


def test_a_download_that_was_cut_off_goes(removal: ModelRemovalService, fetch: Fetch) -> None:
    folder = fetch(MODEL, allow_patterns=["config.json"])
    (folder / "blobs" / "ab.incomplete").write_bytes(b"a part")
    (begun := folder.with_name("models--org--begun") / "blobs").mkdir(parents=True)
    (begun / "ab.incomplete").write_bytes(b"a part")
    for model_id in (MODEL, "org/begun"):
        removal.delete(model_id)
    assert not folder.exists() and not begun.parent.exists()


def test_what_was_prepared_here_goes_unless_it_is_being_prepared(removal: ModelRemovalService, tmp_path: Path) -> None:
    folder = tmp_path / "prepared" / "org--m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with FileLock(f"{folder}.lock"), pytest.raises(ModelInUse, match="being prepared"):
        removal.delete(MODEL)
    removal.delete(MODEL)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == []


def test_a_folder_of_the_operators_is_never_deleted(removal: ModelRemovalService, fetch: Fetch, tmp_path: Path) -> None:
    folder = tmp_path / "operators" / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(PathNotAllowed, match="operator"):
        removal.delete(MODEL, force=True)
    cached = fetch(MODEL)
    removal.delete(MODEL)
    assert folder.is_dir() and not cached.exists()


@pytest.mark.parametrize("model_id", ["../../etc/passwd", "a/b/c", "a--b", ".."])
def test_an_id_that_leads_elsewhere_is_none(removal: ModelRemovalService, model_id: str) -> None:
    with pytest.raises(ModelRejected):
        removal.delete(model_id, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_needs_a_model_now_is_named_and_keeps_it(
    removal: ModelRemovalService, database: Database, peft: PeftService, fetch: Fetch, force: bool
) -> None:
    folder = fetch(MODEL)
    loaded = load(peft, LoadRequest(MODEL, None, Algorithm.LORA, None, {}, "auto", "auto", force=False))
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        Jobs(connection).add(job_record(1, model_id=MODEL))
        Jobs(connection).add(job_record(2, model_id="org/other"))
        Jobs(connection).add(job_record(3, model_id=MODEL))
        Jobs(connection).change_state("job_3", JobState.QUEUED, JobState.CANCELLED, finished_at=MOMENT)
        Adapters(connection).add(ADAPTER)
        Exports(connection).add(_export("exp_1"))
    with pytest.raises(ModelInUse) as refusal:
        removal.delete(MODEL, force=force)
    needed = {"loaded_models": [loaded.id], "jobs": ["job_1"], "exports": ["exp_1"], "adapters": ["adp_1"]}
    assert refusal.value.extras == needed
    for each in (loaded.id, "job_1", "exp_1"):
        assert each in refusal.value.detail
    peft.unload(loaded.id)
    with database.begin() as connection:
        Jobs(connection).change_state("job_1", JobState.QUEUED, JobState.CANCELLED, finished_at=MOMENT)
        record = Exports(connection).get("exp_1")
        assert record is not None
        Exports(connection).change_state(record, ExportState.CANCELLED, finished_at=MOMENT)
    if not force:
        with pytest.raises(ModelInUse, match="adapters have it as their base"):
            removal.delete(MODEL)
        assert folder.is_dir()
    removal.delete(MODEL, force=True)
    assert not folder.exists()


def _export(export_id: str) -> ExportRecord:
    return ExportRecord(
        export_id, 1, ADAPTER.id, ExportKind.MERGED, MergedSettings(), ExportState.QUEUED, 0, False, [], None, None,
        MOMENT, None, None,
    )  # fmt: skip
