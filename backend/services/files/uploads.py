"""Uploads in parts: on the disk until they are complete, cancelled or too old, whatever becomes of the server.

uploads/<upload>/
    upload.json          what was announced, and where it is
    parts/<part>         the content of a part
"""

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

from core.clock import Clock
from core.errors import Conflict, NotFound, Rejected, TooLarge
from core.files import fsync_folder, storage_errors, write_atomic
from services.files.kept import IncomingFile
from store.records import to_text

PART_BYTES = 64 * 2**20  # OpenAI's bound of a part
_LIFE = timedelta(hours=1)  # OpenAI's, after the creation
_REMEMBERED = timedelta(days=1)  # how long one that has ended can still be asked for
_CHUNK_BYTES = 2**20
Status = Literal["pending", "completed", "cancelled", "expired"]


class UploadNotFound(NotFound):
    """There is no upload of that id."""

    slug, title = "upload-not-found", "Upload not found"


class UploadEnded(Conflict):
    """The upload is complete, cancelled or expired; it takes no parts and cannot end in another way."""

    slug, title = "upload-ended", "Upload ended"


class UploadIncomplete(Rejected):
    """The parts are not the file that was announced."""

    slug, title = "upload-incomplete", "Upload incomplete"


@dataclass(frozen=True)
class Upload:
    """An upload in parts.

    Attributes:
        bytes: Of the whole file, as announced.
        expires_after_s: Of the file, once it is complete.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    status: Status
    created_at: str
    expires_at: str
    expires_after_s: int | None

    @property
    def file_id(self) -> str:
        """The file that it becomes."""
        return "file-" + self.id.removeprefix("upload_")


class Uploads:
    """Keeps uploads until they end.

    Args:
        folder: One sub-folder an upload.
        max_bytes: The largest file.
    """

    def __init__(self, folder: Path, max_bytes: int, clock: Clock) -> None:
        self._folder, self._max_bytes, self._clock = folder, max_bytes, clock
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, filename: str, size: int, purpose: str, expires_after_s: int | None) -> Upload:
        """Begin an upload.

        Raises:
            TooLarge: The file would be larger than allowed.
        """
        if size > self._max_bytes:
            raise TooLarge(f"The file has {size} bytes; the limit is {self._max_bytes}.")
        self.remove_old()
        now, ends = self._now(), to_text(self._clock.now() + _LIFE)
        upload_id = f"upload_{uuid.uuid4().hex[:12]}"
        upload = Upload(upload_id, filename, purpose, size, "pending", now, ends, expires_after_s)
        (self._folder / upload.id / "parts").mkdir(parents=True)
        self._write(upload)
        fsync_folder(self._folder)
        return upload

    def get(self, upload_id: str) -> Upload:
        """Return an upload.

        Raises:
            UploadNotFound: There is none of that id.
        """
        path = self._folder / upload_id / "upload.json"
        if not upload_id.startswith("upload_") or not upload_id[7:].isalnum() or not path.exists():
            raise UploadNotFound(f"No upload has the id {upload_id:.60}.")
        upload = Upload(**json.loads(path.read_bytes()))
        if upload.status == "pending" and upload.expires_at <= self._now():
            return self.end(upload, "expired")
        return upload

    def part(self, upload_id: str) -> tuple[str, IncomingFile]:
        """Open a place for a part of a pending upload, and name it.

        Raises:
            UploadNotFound, UploadEnded: There is no such upload, or it takes no more parts.
            TooLarge: The upload has more bytes in parts than its file and one part may have.
        """
        upload = self.pending(upload_id)
        room = upload.bytes + PART_BYTES - sum(path.stat().st_size for path in self._parts(upload).iterdir())
        if room <= 0:
            raise TooLarge(f"The parts of {upload_id} have more bytes than the {upload.bytes} that were announced.")
        part_id = f"part_{uuid.uuid4().hex[:12]}"
        return part_id, IncomingFile(self._parts(upload) / f"{part_id}.tmp", part_id, min(PART_BYTES, room))

    def keep_part(self, upload_id: str, part_id: str) -> None:
        """Give a part that has arrived its place.

        Raises:
            UploadNotFound, UploadEnded: The upload has ended meanwhile.
        """
        folder = self._parts(self.pending(upload_id))
        os.replace(folder / f"{part_id}.tmp", folder / part_id)
        fsync_folder(folder)

    def pending(self, upload_id: str) -> Upload:
        """Return an upload that has not ended.

        Raises:
            UploadNotFound, UploadEnded: There is no such upload, or it has ended.
        """
        upload = self.get(upload_id)
        if upload.status != "pending":
            raise UploadEnded(f"The upload {upload_id} is {upload.status}.")
        return upload

    def assemble(self, upload: Upload, part_ids: list[str], md5: str | None, target: IncomingFile) -> None:
        """Write an upload's parts, in the order given, as one file.

        Raises:
            UploadIncomplete: A part is not there, or the parts are not the file that was announced.
            StorageFull: There is no room for the file.
        """
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in self._chunks(upload, part_ids):
            digest.update(chunk)
            target.write(chunk)
        if target.size_bytes != upload.bytes:
            raise UploadIncomplete(f"The parts have {target.size_bytes} bytes; {upload.bytes} were announced.")
        if md5 is not None and md5.lower() != digest.hexdigest():
            raise UploadIncomplete(f"md5: the parts have {digest.hexdigest()}, not {md5:.40}.")
        target.close()

    def _chunks(self, upload: Upload, part_ids: list[str]) -> Iterator[bytes]:
        there = {path.name for path in self._parts(upload).iterdir() if path.suffix != ".tmp"}
        missing = [part_id for part_id in part_ids if part_id not in there]
        if missing:
            raise UploadIncomplete(f"part_ids: {upload.id} has no part {missing[0]:.60}.")
        for part_id in part_ids:
            with storage_errors(self._folder), (self._parts(upload) / part_id).open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk

    def end(self, upload: Upload, status: Status) -> Upload:
        """Record how an upload ended, and delete its parts."""
        with self._lock:
            ended = replace(upload, status=status)
            self._write(ended)
            shutil.rmtree(self._parts(upload), ignore_errors=True)
            return ended

    def remove_old(self) -> None:
        """End the uploads whose time has come, and forget those that ended long ago."""
        forgotten = to_text(self._clock.now() - _REMEMBERED)
        for folder in self._folder.glob("upload_*"):
            try:
                upload = self.get(folder.name)
            except UploadNotFound:  # killed before it was written
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if upload.status != "pending" and upload.expires_at < forgotten:
                shutil.rmtree(folder, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Delete parts that were cut off."""
        for path in self._folder.glob("upload_*/parts/*.tmp"):
            path.unlink()

    def _parts(self, upload: Upload) -> Path:
        return self._folder / upload.id / "parts"

    def _write(self, upload: Upload) -> None:
        write_atomic(self._folder / upload.id / "upload.json", json.dumps(asdict(upload)).encode())

    def _now(self) -> str:
        return to_text(self._clock.now())
