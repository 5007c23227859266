"""The folders of datasets. A file that several datasets have is stored once."""

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.files import fsync_folder, write_atomic

_MANIFEST = "dataset.json"


@dataclass(frozen=True)
class SourceFile:
    """A file as the client sent it.

    Attributes:
        name: The client's name for it.
        path: Where it is, below the dataset's folder.
    """

    name: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Facts about a dataset that its database record does not hold.

    Attributes:
        source: Where it came from: an upload, the Hub, a folder.
        detected: What the files turned out to be, in words.
        answers: Rows with an answer that may be learned, and rows whose last answer may.
        duplicates: Rows that repeat an earlier one.
        rows_sha256: Of the normal rows.
        settings: How it was asked to be read.
    """

    files: tuple[SourceFile, ...]
    source: Mapping[str, Any]
    detected: tuple[str, ...] = ()
    unused_columns: tuple[str, ...] = ()
    answers: tuple[int, int] | None = None
    duplicates: int | None = None
    rows_sha256: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class DatasetFiles:
    """The datasets' files.

    `content/` has a hard link to each file, named by its sha256. A second dataset with the same content is one more
    link. The file system counts the links, so no other count can disagree with it.

    Args:
        folder: One sub-folder a dataset: `original/`, `rows.jsonl` and `dataset.json`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._content = folder, folder / "content"
        self._lock = threading.Lock()
        self._content.mkdir(parents=True, exist_ok=True)

    def new(self, dataset_id: str) -> Path:
        """Make and return the folder in which a dataset is put together."""
        temporary = self._folder / f"{dataset_id}.tmp"
        (temporary / "original").mkdir(parents=True)
        return temporary

    def discard(self, dataset_id: str) -> None:
        """Delete a dataset that was being put together."""
        shutil.rmtree(self._folder / f"{dataset_id}.tmp", ignore_errors=True)

    def commit(self, dataset_id: str, manifest: Manifest) -> Path:
        """Move a finished draft to its place, as a whole or not at all."""
        temporary, final = self._folder / f"{dataset_id}.tmp", self.path(dataset_id)
        with self._lock:
            for file in manifest.files:
                self._share(temporary / file.path, file.sha256)
            if manifest.rows_sha256 is not None:
                self._share(temporary / "rows.jsonl", manifest.rows_sha256)
            write_atomic(temporary / _MANIFEST, json.dumps(asdict(manifest)).encode())
            for folder in (self._content, temporary / "original", temporary):
                fsync_folder(folder)
            os.replace(temporary, final)
            fsync_folder(self._folder)
        return final

    def _share(self, path: Path, sha256: str) -> None:
        shared = self._content / sha256
        try:
            try:
                os.link(path, shared)
            except FileExistsError:
                again = path.with_name(path.name + ".tmp")
                os.link(shared, again)
                os.replace(again, path)
        except OSError as error:
            # Some file systems have no hard links. Each dataset then has a copy of its own.
            if isinstance(error, FileNotFoundError) or not path.exists():
                raise

    def path(self, dataset_id: str) -> Path:
        """Return a dataset's folder."""
        return self._folder / dataset_id

    def manifest(self, dataset_id: str) -> Manifest:
        """Return a dataset's manifest. Those of the first version hold little."""
        folder = self.path(dataset_id)
        file = folder / _MANIFEST
        if not file.exists():
            return Manifest(files=(), source={"kind": "upload"})
        told = json.loads(file.read_bytes())
        told["files"] = tuple(SourceFile(**source) for source in told["files"])
        for name in ("detected", "unused_columns", "answers"):
            told[name] = tuple(told[name]) if told[name] is not None else None
        return Manifest(**told)

    def delete(self, dataset_id: str) -> None:
        """Delete a dataset's folder, and the content that no other has."""
        manifest = self.manifest(dataset_id)
        with self._lock:
            shutil.rmtree(self.path(dataset_id))
            for sha256 in {*(file.sha256 for file in manifest.files), manifest.rows_sha256 or ""} - {""}:
                self._forget(self._content / sha256)

    def _forget(self, shared: Path) -> None:
        if shared.exists() and shared.stat().st_nlink == 1:
            shared.unlink()

    def remove_leftovers(self) -> None:
        """Delete the remains of interrupted uploads. Whole folders stay: another database may use unknown ones."""
        for folder in self._folder.glob("ds_*.tmp"):
            shutil.rmtree(folder)
        for shared in self._content.iterdir():
            self._forget(shared)
