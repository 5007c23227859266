"""A draft of a dataset: its files while they arrive."""

import hashlib
import os
from pathlib import Path

from core.errors import TooLarge
from core.files import storage_errors
from services.datasets.files import SourceFile
from services.datasets.imports import Import

_CHUNK_BYTES = 2**20


class Draft:
    """A dataset that is being put together. First its files arrive, then they are read."""

    def __init__(self, dataset_id: str, folder: Path, progress: Import, max_bytes: int) -> None:
        self.id, self.folder, self.progress = dataset_id, folder, progress
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self.files: list[SourceFile] = []

    def receive(self, name: str) -> "DraftFile":
        """Open the next file of the dataset."""
        return DraftFile(self, name, Path("original") / f"{len(self.files):04d}")

    def copy(self, source: Path, name: str) -> None:
        """Copy a file of this machine into the dataset, as its next one.

        Raises:
            ImportCancelled, TooLarge, StorageFull: As for one that is sent.
        """
        target = self.receive(name)
        try:
            with source.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    target.write(chunk)
        except BaseException:
            target.abandon()
            raise
        target.close()

    def count(self, size: int) -> None:
        """Count bytes that arrived.

        Raises:
            ImportCancelled: The import was cancelled.
            TooLarge: The dataset is larger than allowed.
        """
        self.progress.check()
        self._size_bytes += size
        # Downloaded files were counted when they arrived.
        self.progress.received_bytes = max(self.progress.received_bytes, self._size_bytes)
        if self._size_bytes > self._max_bytes:
            raise TooLarge(f"The dataset is larger than {self._max_bytes} bytes.")


class DraftFile:
    """One file while it arrives. Closing it keeps it."""

    def __init__(self, draft: Draft, name: str, path: Path) -> None:
        self._draft, self._name, self._path = draft, name, path
        self._digest, self._size = hashlib.sha256(), 0
        self._file = (draft.folder / path).open("xb")

    def write(self, data: bytes) -> int:
        """Append.

        Raises:
            ImportCancelled: The import was cancelled.
            TooLarge: The dataset is larger than allowed.
            StorageFull: There is no space for it.
        """
        self._draft.count(len(data))
        self._digest.update(data)
        self._size += len(data)
        with storage_errors(self._draft.folder):
            return self._file.write(data)

    def close(self) -> None:
        """Keep the file."""
        with storage_errors(self._draft.folder):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._draft.files.append(SourceFile(self._name, str(self._path), self._size, self._digest.hexdigest()))

    def abandon(self) -> None:
        """Close the file of a draft that will be discarded."""
        self._file.close()
