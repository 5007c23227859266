"""A dataset that is being put together: its files, as they come."""

import hashlib
import os
from pathlib import Path

from core.errors import TooLarge
from core.files import storage_errors
from services.datasets.files import SourceFile
from services.datasets.imports import Import


class Draft:
    """A dataset that is being put together. Files come first, then they are read."""

    def __init__(self, dataset_id: str, folder: Path, progress: Import, max_bytes: int) -> None:
        self.id, self.folder, self.progress = dataset_id, folder, progress
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self.files: list[SourceFile] = []

    def receive(self, name: str) -> "DraftFile":
        """Open the next file of the dataset."""
        return DraftFile(self, name, Path("original") / f"{len(self.files):04d}")

    def count(self, size: int) -> None:
        """Count what came.

        Raises:
            ImportCancelled: It is no longer wanted.
            TooLarge: It is more than a dataset may have.
        """
        self.progress.check()
        self._size_bytes += size
        # What was downloaded first is counted already.
        self.progress.received_bytes = max(self.progress.received_bytes, self._size_bytes)
        if self._size_bytes > self._max_bytes:
            raise TooLarge(f"The dataset is larger than {self._max_bytes} bytes.")


class DraftFile:
    """One file as it comes; closing it keeps it."""

    def __init__(self, draft: Draft, name: str, path: Path) -> None:
        self._draft, self._name, self._path = draft, name, path
        self._digest, self._size = hashlib.sha256(), 0
        self._file = (draft.folder / path).open("xb")

    def write(self, data: bytes) -> int:
        """Append.

        Raises:
            ImportCancelled: It is no longer wanted.
            TooLarge: It is more than a dataset may have.
            StorageFull: There is no room for it.
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
