"""Imports datasets from the Hub, and from a folder on this machine."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from core.errors import (
    DatasetNotFound,
    DatasetRejected,
    PathNotAllowed,
    TooLarge,
)
from domain.datasets.parts import Parts, choose
from services.datasets.draft import Draft
from services.datasets.hub_files import HubDatasets
from services.datasets.imports import Import, Imports
from services.datasets.read_settings import ReadSettings
from store.records import DatasetRecord

_MAX_FILES = 10_000


class Datasets(Protocol):
    """Keeps datasets; the dataset service does."""

    imports: Imports

    def draft(self, progress: Import) -> Draft:
        """Begin a dataset. It must be finished or discarded."""
        ...

    def discard(self, draft: Draft) -> None:
        """Forget a draft and what came of it."""
        ...

    def finish(self, draft: Draft, name: str, settings: ReadSettings, source: Mapping[str, Any]) -> DatasetRecord:
        """Read a draft's files and store the dataset."""
        ...


class DatasetSources:
    """Imports datasets from the Hub and from a folder.

    Args:
        datasets: Stores them.
        hub: Fetches the Hub's.
        folder: Only files below it may be imported from this machine.
        max_bytes: Larger datasets of a folder are refused before they are copied.
    """

    def __init__(self, datasets: Datasets, hub: HubDatasets, folder: Path, max_bytes: int) -> None:
        self._datasets, self._hub, self._folder, self._max_bytes = datasets, hub, folder, max_bytes

    # The Hub

    def from_hub(
        self,
        hub_id: str,
        revision: str | None,
        config: str | None,
        split: str | None,
        name: str,
        settings: ReadSettings,
    ) -> DatasetRecord:
        """Download the files of one split and store them as a dataset.

        Raises:
            ImportCancelled: The import was cancelled.
            DatasetNotFound, DatasetGated, AccessDenied, HubUnavailable, DownloadCorrupt: As `HubDatasets.fetch` says.
            DatasetRejected: There is no such configuration or split, or the files cannot be read.
            TooLarge, StorageFull: The files are larger than a dataset may be, or than the free space.
        """
        with self._datasets.imports.running(name or hub_id, "downloading", None) as progress:
            fetched = self._hub.fetch(hub_id, revision, config, split, progress)
            draft = self._copied({path: fetched.folder / path for path in fetched.parts.paths}, progress)
            source = {"kind": "hub", "hub_id": hub_id, "revision": revision, "sha": fetched.commit}
            return self._datasets.finish(draft, name or hub_id, settings, source | _described(fetched.parts))

    # A folder

    def from_folder(
        self, path: str, config: str | None, split: str | None, name: str, settings: ReadSettings
    ) -> DatasetRecord:
        """Copy a file, or the files of one split below a folder, and store them as a dataset.

        Raises:
            DatasetNotFound: There is nothing of that name.
            PathNotAllowed: The path leads out of the folder, by itself or by a link.
            ImportCancelled, DatasetRejected, TooLarge: As for the Hub.
        """
        start = self._inside(path)
        if start.is_file():
            parts, base = Parts("default", "train", (start.name,), ()), start.parent
        else:
            parts, base = choose(self._walk(start), None, config, split), start
        root = self._folder.resolve()
        sources = {name: self._inside(str((base / name).relative_to(root))) for name in parts.paths}
        total = sum(source.stat().st_size for source in sources.values())
        if total > self._max_bytes:
            raise TooLarge(f"The files have {total} bytes; the limit is {self._max_bytes}.")
        with self._datasets.imports.running(name or path, "receiving", total) as progress:
            draft = self._copied(sources, progress)
            told = {"kind": "folder", "path": path} | _described(parts)
            return self._datasets.finish(draft, (name or start.name)[:200], settings, told)

    def _copied(self, files: Mapping[str, Path], progress: Import) -> Draft:
        """Begin a dataset with copies of files, by the names that they have in it."""
        draft = self._datasets.draft(progress)
        try:
            for name, file in files.items():
                draft.copy(file, name)
        except BaseException:
            self._datasets.discard(draft)
            raise
        return draft

    def _inside(self, path: str) -> Path:
        root = self._folder.resolve()
        # The path's text is checked first, so that the answer tells nothing about files elsewhere.
        words = PurePosixPath(os.path.normpath(path))
        if "\0" in path or words.is_absolute() or words.parts[:1] == (os.pardir,):
            raise PathNotAllowed(f"{path!r:.200} is not below {root}, from which datasets may be taken.")
        try:
            target = (root / path).resolve(strict=True)
        except FileNotFoundError as error:
            raise DatasetNotFound(f"There is no {path!r:.200} in {root}.") from error
        except (OSError, RuntimeError) as error:  # a name too long; a loop of links
            raise PathNotAllowed(f"{path!r:.200} cannot be followed.") from error
        if not target.is_relative_to(root):
            raise PathNotAllowed(f"{path!r} is not below {root}, from which datasets may be taken.")
        return target

    def _walk(self, start: Path) -> list[str]:
        paths: list[str] = []
        for parent, _, names in os.walk(start):  # links to folders are not followed
            paths += [(Path(parent) / name).relative_to(start).as_posix() for name in names]
            if len(paths) > _MAX_FILES:
                raise DatasetRejected(f"There are more than {_MAX_FILES} files below {start.name}.", errors=[])
        return paths


def _described(parts: Parts) -> dict[str, Any]:
    return {
        "config": parts.config,
        "split": parts.split,
        "files": list(parts.paths),
        "left_out": list(parts.left_out),
    }
