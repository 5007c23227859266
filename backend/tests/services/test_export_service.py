"""Exports move through their states whatever happens to them; the work itself is a fake."""

import random
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from core.errors import (
    AdapterInUse,
    AdapterNotFound,
    DatabaseUnavailable,
    ExportNotFound,
    ExportRejected,
    StorageFull,
    StudioError,
    TransitionNotPermitted,
)
from core.files import whole_folder
from domain.exports import ExportResult, GgufSettings, MergedModel, MergedSettings
from domain.jobs.export_states import FINAL_STATES, ExportKind, ExportState, may_change
from services.adapter_service import AdapterService
from services.engines.process import EngineDied
from services.export_service import ExportFileNotFound, ExportService
from services.exports.control import ExportControl
from services.exports.ledger import ExportLedger
from store.database import Database
from store.records import AdapterRecord, ExportRecord
from store.repositories import Adapters
from tests.support.hub_double import ManualClock
from tests.support.server import wait_until

Act = Callable[[ExportRecord, Path, ExportControl], ExportResult]


MADE = MergedModel(size_bytes=7, dtype="float32", adapted_layers=14, notes=["done"])


class NothingLoaded:
    """The only thing that deleting an adapter asks of the loaded models."""

    def detach_everywhere(self, _adapter_id: str) -> None:
        return


def make_files(_record: ExportRecord, folder: Path, _control: ExportControl) -> ExportResult:
    with whole_folder(folder) as temporary:
        (temporary / "model.safetensors").write_bytes(b"weights")
    return MADE


def until_stopped(_record: ExportRecord, _folder: Path, control: ExportControl) -> ExportResult:
    control.report("merging", 0.5)
    while True:
        control.wait(0.01)


class Bench:
    """A service on a database of its own; `act` is what an export does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.database = Database(f"sqlite:///{home / 'studio.db'}")
        self.database.migrate()
        self.adapters = AdapterService(self.database, home / "adapters", cast(Any, NothingLoaded()))
        self.act: Act = make_files
        self.open()

    def accept(self, kind: ExportKind, adapter: AdapterRecord, settings: Any) -> None:
        if settings != MergedSettings():
            raise ExportRejected("No.")

    def run(self, record: ExportRecord, folder: Path, control: ExportControl) -> ExportResult:
        return self.act(record, folder, control)

    def open(self) -> None:
        works, clock = {ExportKind.MERGED: self}, ManualClock()
        self.ledger = ExportLedger(self.database, clock)
        self.service = ExportService(self.ledger, self.adapters, works, self.home / "exports", clock)

    def add_adapter(self, adapter_id: str = "adp_1", name: str = "mine") -> None:
        folder = self.home / "adapters" / adapter_id
        folder.mkdir()
        record = AdapterRecord(
            id=adapter_id, name=name, base_model_id="tests/tiny", base_revision=None, algorithm="lora", config=None,
            job_id=None, dataset_sha256=None, metrics={}, path=str(folder), created_at=adapter_id, version=0, source={},
        )  # fmt: skip
        with self.database.begin() as connection:
            Adapters(connection).add(record)

    def create(self) -> str:
        return self.service.create("adp_1", ExportKind.MERGED, MergedSettings()).id

    def wait(self, export_id: str, *states: ExportState) -> ExportRecord:
        wait_until(lambda: self.ledger.get(export_id).state in states)
        return self.ledger.get(export_id)

    def die(self) -> None:
        """End as a killed server does: the rows say what they said."""
        self.service._queue._closing.set()  # so that nothing is written any more
        self.ledger.move = lambda *_, **__: False  # type: ignore[method-assign]
        self.service.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.add_adapter()
    yield bench
    bench.service.close()
    bench.database.close()


def test_an_export_is_queued_runs_and_keeps_its_folder(bench: Bench) -> None:
    export_id = bench.create()
    record = bench.wait(export_id, ExportState.SUCCEEDED)
    assert [change.state for change in record.history] == ["queued", "running", "succeeded"]
    assert (record.attempts, record.result, record.error) == (1, MADE, None)
    assert bench.service.files(record) == [("model.safetensors", 7)]
    assert bench.service.file(export_id, "model.safetensors").read_bytes() == b"weights"
    assert bench.service.progress_of(export_id) is None
    for name in ("other", "../../studio.db", ".."):
        with pytest.raises(ExportFileNotFound):
            bench.service.file(export_id, name)
    with pytest.raises(TransitionNotPermitted):
        bench.service.cancel(export_id)
    bench.service.delete(export_id)
    assert not (bench.home / "exports" / export_id).exists()
    with pytest.raises(ExportNotFound):
        bench.ledger.get(export_id)
    with pytest.raises(AdapterNotFound):
        bench.service.create("adp_none", ExportKind.MERGED, MergedSettings())
    with pytest.raises(ExportRejected):
        bench.service.create("adp_1", ExportKind.MERGED, GgufSettings(quantization="f16"))
    assert bench.ledger.all() == []


def test_running_and_queued_exports_are_cancelled(bench: Bench) -> None:
    bench.act = until_stopped
    running, queued = bench.create(), bench.create()
    bench.wait(running, ExportState.RUNNING)
    wait_until(lambda: bench.service.progress_of(running) is not None)
    assert bench.service.cancel(queued).state is ExportState.CANCELLED
    with pytest.raises(TransitionNotPermitted):
        bench.service.delete(running)
    with pytest.raises(ExportFileNotFound, match="running"):
        bench.service.zipped(running)
    with pytest.raises(AdapterInUse, match=running):
        bench.adapters.delete("adp_1")
    bench.service.cancel(running)
    record = bench.wait(running, ExportState.CANCELLED)
    assert record.finished_at is not None and bench.ledger.get(queued).attempts == 0
    bench.adapters.delete("adp_1")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EngineDied("It ended by signal 9.", signal=9, exit_code=None, log_tail=["last words"]), "engine_died"),
        (StudioError("No.", error_class="bad_setting"), "bad_setting"),
        (RuntimeError("a secret of the server's"), "server"),
    ],
)
def test_a_failure_says_why_and_the_next_export_runs(bench: Bench, error: Exception, kind: str) -> None:
    def fail(_record: ExportRecord, _folder: Path, _control: ExportControl) -> ExportResult:
        raise error

    bench.act = fail
    record = bench.wait(bench.create(), ExportState.FAILED)
    assert record.error is not None and record.error.error_class == kind
    assert "secret" not in record.error.message
    if isinstance(error, EngineDied):
        assert (record.error.signal, record.error.log_tail) == (9, ["last words"])
    bench.act = make_files
    bench.wait(bench.create(), ExportState.SUCCEEDED)


def test_a_killed_server_takes_its_exports_up_again_in_order(bench: Bench) -> None:
    bench.act = until_stopped
    first, second, third = bench.create(), bench.create(), bench.create()
    bench.wait(first, ExportState.RUNNING)
    bench.service.cancel(second)
    bench.die()
    (bench.home / "exports" / f".{first}.tmp").mkdir()
    assert bench.ledger.get(first).state is ExportState.RUNNING

    done: list[str] = []

    def note(record: ExportRecord, folder: Path, control: ExportControl) -> ExportResult:
        done.append(record.id)
        return make_files(record, folder, control)

    bench.act = note
    bench.open()
    bench.service.start()
    assert not list((bench.home / "exports").glob(".*"))
    bench.wait(third, ExportState.SUCCEEDED)
    record = bench.wait(first, ExportState.SUCCEEDED)
    assert done == [first, third] and record.attempts == 2
    assert [change.state for change in record.history] == ["queued", "running", "queued", "running", "succeeded"]
    assert bench.ledger.get(second).state is ExportState.CANCELLED


def test_a_cancelled_export_stays_cancelled_though_the_server_is_killed_before_it_obeys(bench: Bench) -> None:
    told = threading.Event()

    def deaf(_record: ExportRecord, _folder: Path, _control: ExportControl) -> ExportResult:
        told.wait(600)
        return MADE

    bench.act = deaf
    export_id = bench.create()
    bench.wait(export_id, ExportState.RUNNING)
    assert bench.service.cancel(export_id).state is ExportState.RUNNING
    bench.ledger.move = lambda *_, **__: False  # type: ignore[method-assign]  # as a killed server: no more rows
    told.set()
    bench.die()
    (bench.home / "exports" / export_id).mkdir()  # whole, and not recorded
    bench.act = make_files
    bench.open()
    bench.service.start()
    record = bench.wait(export_id, ExportState.CANCELLED)
    assert record.attempts == 1 and not (bench.home / "exports" / export_id).exists()


def test_a_server_that_is_stopped_lets_a_cancelled_export_be_cancelled(bench: Bench) -> None:
    bench.act = until_stopped
    export_id = bench.create()
    bench.wait(export_id, ExportState.RUNNING)
    bench.service.cancel(export_id)
    bench.service.close()
    assert bench.ledger.get(export_id).state is ExportState.CANCELLED


@pytest.mark.parametrize("error", [DatabaseUnavailable("away"), StorageFull("full")])
@pytest.mark.parametrize("heard", [False, True])
def test_a_database_that_is_away_for_a_while_loses_no_export(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: StudioError, heard: bool
) -> None:
    monkeypatch.setattr("store.patience._TRY_AGAIN_S", 0.01)
    get, move, moves = bench.ledger.get, bench.ledger.move, list[ExportState]()

    def unsure(record: ExportRecord, following: ExportState, **columns: Any) -> bool:
        moves.append(following)
        if moves.count(following) == 1:
            if heard:
                move(record, following, **columns)
            raise error
        return move(record, following, **columns)

    reads = iter([error])

    def away_once(export_id: str) -> ExportRecord:
        if threading.current_thread().name.startswith("export-") and (first := next(reads, None)) is not None:
            raise first
        return get(export_id)

    bench.ledger.move, bench.ledger.get = unsure, away_once  # type: ignore[method-assign]
    record = bench.wait(bench.create(), ExportState.SUCCEEDED)
    assert [change.state for change in record.history] == ["queued", "running", "succeeded"]
    wait_until(lambda: moves == [ExportState.RUNNING] * 2 + [ExportState.SUCCEEDED] * 2)
    assert record.attempts == 1


def test_a_server_that_is_stopped_leaves_its_export_queued(bench: Bench) -> None:
    bench.act = until_stopped
    export_id = bench.create()
    bench.wait(export_id, ExportState.RUNNING)
    bench.service.close()
    assert bench.ledger.get(export_id).state is ExportState.QUEUED


def test_an_export_that_ends_the_server_again_and_again_fails(bench: Bench) -> None:
    bench.act = until_stopped
    export_id = bench.create()
    for _ in range(5):
        bench.wait(export_id, ExportState.RUNNING)
        bench.die()
        bench.open()
        bench.service.start()
    record = bench.wait(export_id, ExportState.FAILED)
    assert record.error is not None and record.error.error_class == "server_ended"


def test_cancelling_races_with_the_end_and_there_is_one_final_state(bench: Bench) -> None:
    seen: list[ExportState] = []

    def quick(_record: ExportRecord, _folder: Path, control: ExportControl) -> ExportResult:
        control.wait(random.uniform(0, 0.002))
        return MADE

    bench.act = quick
    for _ in range(60):
        export_id = bench.create()

        def cancel(export_id: str = export_id) -> None:
            try:
                bench.service.cancel(export_id)
            except TransitionNotPermitted:
                return

        threads = [threading.Thread(target=cancel) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        record = bench.wait(export_id, *FINAL_STATES)
        states = [ExportState(change.state) for change in record.history]
        assert states[-1] is record.state and record.state in (ExportState.SUCCEEDED, ExportState.CANCELLED)
        assert all(may_change(*pair) for pair in pairwise(states))
        seen.append(record.state)
    assert ExportState.CANCELLED in seen


def test_adapters_of_one_name_are_versions(bench: Bench) -> None:
    for number, name in ((2, "mine"), (3, "other"), (4, "mine")):
        bench.add_adapter(f"adp_{number}", name)
    versions = {record.id: record.version for record in bench.adapters.all()}
    assert versions == {"adp_1": 1, "adp_2": 2, "adp_3": 1, "adp_4": 3}
