"""Files expire, uploads in parts end and are bounded, and nothing is left of what was cut off."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import TooLarge
from services.file_service import FileNotFound, FileService
from services.files.kept import KeptFiles
from services.files.uploads import UploadEnded, UploadNotFound, Uploads
from store.database import Database
from tests.support.datasets_double import dataset_service
from tests.support.hub_double import ManualClock

LIMIT = 1000
HOUR_S = 3600


@pytest.fixture
def service(tmp_path: Path, clock: ManualClock) -> Iterator[FileService]:
    with dataset_service(tmp_path / "datasets") as datasets:
        database = Database(f"sqlite:///{tmp_path}/files.db")
        database.migrate()
        uploads = Uploads(tmp_path / "uploads", LIMIT, clock)
        made = FileService(database, KeptFiles(tmp_path / "files", LIMIT), uploads, datasets, clock)
        made.start()
        yield made
        made.close()
        database.close()


def keep(service: FileService, content: bytes, expires_after_s: int | None = None) -> str:
    file_id, incoming = service.incoming("a.txt")
    incoming.write(content)
    incoming.close()
    return service.add(file_id, incoming, "user_data", expires_after_s).id


def test_a_file_is_gone_when_its_time_has_come(service: FileService, clock: ManualClock, tmp_path: Path) -> None:
    kept, short = keep(service, b"a"), keep(service, b"b", HOUR_S)
    clock.advance(HOUR_S - 1)
    assert {record.id for record in service.all()} == {kept, short}
    clock.advance(1)
    with pytest.raises(FileNotFound):
        service.get(short)
    assert [record.id for record in service.all()] == [kept]
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept]


def test_a_file_that_was_cut_off_leaves_nothing(service: FileService, tmp_path: Path) -> None:
    _, cut_off = service.incoming("a")
    cut_off.write(b"a")
    _, large = service.incoming("b")
    with pytest.raises(TooLarge):
        large.write(b"x" * (LIMIT + 1))
    large.abandon()
    service.start()
    assert list((tmp_path / "files").iterdir()) == [] and service.all() == []


def test_an_upload_ends_after_an_hour_and_is_forgotten_after_a_day(service: FileService, clock: ManualClock) -> None:
    uploads = service.uploads
    upload = uploads.create("a", 3, "user_data", None)
    part_id, part = uploads.part(upload.id)
    part.write(b"abc")
    part.close()
    uploads.keep_part(upload.id, part_id)
    clock.advance(HOUR_S)
    assert uploads.get(upload.id).status == "expired"
    with pytest.raises(UploadEnded):
        service.complete(upload.id, [part_id], None)
    with pytest.raises(UploadEnded):
        uploads.part(upload.id)
    clock.advance(25 * HOUR_S)
    uploads.create("b", 3, "user_data", None)
    with pytest.raises(UploadNotFound):
        uploads.get(upload.id)


@pytest.mark.parametrize("upload_id", ["upload_", "upload_../../x", "../files", "upload_none", "file-1"])
def test_only_uploads_are_found(service: FileService, upload_id: str) -> None:
    with pytest.raises(UploadNotFound):
        service.uploads.get(upload_id)


def test_parts_are_bounded(service: FileService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.files.uploads.PART_BYTES", 10)
    upload = service.uploads.create("a", 15, "user_data", None)
    for size, refused in ((10, False), (11, True), (10, False), (6, True), (5, False)):
        part_id, part = service.uploads.part(upload.id)
        if refused:
            with pytest.raises(TooLarge):
                part.write(b"x" * size)
            part.abandon()
        else:
            part.write(b"x" * size)
            part.close()
            service.uploads.keep_part(upload.id, part_id)
    with pytest.raises(TooLarge):
        service.uploads.part(upload.id)
    with pytest.raises(TooLarge):
        service.uploads.create("a", LIMIT + 1, "user_data", None)


def test_a_complete_that_was_cut_off_gives_the_same_file(service: FileService) -> None:
    upload = service.uploads.create("a", 3, "user_data", HOUR_S)
    part_id, part = service.uploads.part(upload.id)
    part.write(b"abc")
    part.close()
    service.uploads.keep_part(upload.id, part_id)
    service._assembled(upload, [part_id], None)  # and the server dies before the upload is recorded as complete
    done, record = service.complete(upload.id, [part_id], None)
    assert done.status == "completed" and record.id == done.file_id and record.expires_at is not None
    assert [found.id for found in service.all()] == [record.id]
