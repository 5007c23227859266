"""Datasets from the Hub, and from a folder on this machine."""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from core.errors import (
    DatasetNotFound,
    DatasetRejected,
    PathNotAllowed,
    TooLarge,
)
from core.logging import get_logger
from domain.datasets.parts import Parts, PartsNotFound, choose
from domain.hub.repos import dataset_repo
from services.datasets.draft import Draft
from services.datasets.imports import Import, Imports
from services.datasets.read_settings import ReadSettings
from services.hub.errors import map_hub_error
from services.hub.http import hub_token
from store.records import DatasetRecord

_MAX_CARD_BYTES = 4 * 2**20
_MAX_FILES = 10_000
_CHUNK_BYTES = 2**20
_log = get_logger(__name__)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `sha256` is what the Hub says of large ones."""

    path: str
    size_bytes: int
    sha256: str | None


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
    """Brings datasets in from elsewhere than an upload.

    Args:
        datasets: Stores them.
        folder: What may be taken from this machine is below it.
        max_bytes: Larger datasets are refused before they are fetched.
    """

    def __init__(self, datasets: Datasets, folder: Path, max_bytes: int) -> None:
        self._datasets, self._folder, self._max_bytes = datasets, folder, max_bytes

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
            DatasetNotFound, DatasetGated, HubUnavailable: As the Hub says.
            DatasetRejected: There is no such configuration or split, or the files cannot be read.
            TooLarge: They are larger than a dataset may be.
        """
        with self._datasets.imports.running(name or hub_id, "downloading", None) as progress:
            draft = self._datasets.draft(progress)
            try:
                sha, files = _hub_files(hub_id, revision)
                card = self._hub_card(hub_id, sha, files, draft)
                parts = _chosen([file.path for file in files], card, config, split)
                wanted = [file for file in files if file.path in parts.paths]
                progress.total_bytes = sum(file.size_bytes for file in wanted)
                self._check_size(progress.total_bytes)
                for file in sorted(wanted, key=lambda file: parts.paths.index(file.path)):
                    self._fetch(hub_id, sha, file, draft)
            except BaseException:
                self._datasets.discard(draft)
                raise
            source = {"kind": "hub", "hub_id": hub_id, "revision": revision, "sha": sha} | _described(parts)
            return self._datasets.finish(draft, name or hub_id, settings, source)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise TooLarge(f"The files have {size_bytes} bytes; the limit is {self._max_bytes}.")

    def _hub_card(self, hub_id: str, sha: str, files: list[HubFile], draft: Draft) -> Mapping[str, Any] | None:
        if not any(file.path == "README.md" and file.size_bytes <= _MAX_CARD_BYTES for file in files):
            return None
        from huggingface_hub import metadata_load
        from yaml import YAMLError

        path = _download(hub_id, sha, "README.md", draft.folder / "hub", None)
        try:
            card = metadata_load(path)
        except (YAMLError, ValueError) as error:
            _log.warning("dataset_sources.card_not_read", hub_id=hub_id, reason=str(error))
            return None
        return card if isinstance(card, dict) else None

    def _fetch(self, hub_id: str, sha: str, file: HubFile, draft: Draft) -> None:
        def count(_state: str, _fraction: float | None, finished: int | None, _total: int | None) -> None:
            draft.progress.received_bytes = before + (finished or 0)

        before = draft.progress.received_bytes
        path = _download(hub_id, sha, file.path, draft.folder / "hub", _byte_counter(count))
        draft.progress.received_bytes = before
        digest = draft.adopt(path, file.path)
        if file.sha256 is not None and digest != file.sha256:
            raise DatasetRejected(f"{file.path} is not what the Hub says it is: its sha256 differs.", errors=[])

    # A folder

    def from_folder(
        self, path: str, config: str | None, split: str | None, name: str, settings: ReadSettings
    ) -> DatasetRecord:
        """Copy a file, or the files of one split below a folder, and store them as a dataset.

        Raises:
            DatasetNotFound: There is nothing of that name.
            PathNotAllowed: It is elsewhere, or a link to elsewhere.
            DatasetRejected, TooLarge: As for the Hub.
        """
        start = self._inside(path)
        if start.is_file():
            parts, base = Parts("default", "train", (start.name,), ()), start.parent
        else:
            parts, base = _chosen(self._walk(start), None, config, split), start
        root = self._folder.resolve()
        sources = {name: self._inside(str((base / name).relative_to(root))) for name in parts.paths}
        total = sum(source.stat().st_size for source in sources.values())
        self._check_size(total)
        with self._datasets.imports.running(name or path, "receiving", total) as progress:
            draft = self._datasets.draft(progress)
            try:
                for file, source in sources.items():
                    _copy(source, file, draft)
            except BaseException:
                self._datasets.discard(draft)
                raise
            told = {"kind": "folder", "path": path} | _described(parts)
            return self._datasets.finish(draft, (name or start.name)[:200], settings, told)

    def _inside(self, path: str) -> Path:
        root = self._folder.resolve()
        # By its words first, so that nobody learns what is elsewhere.
        words = PurePosixPath(os.path.normpath(path))
        if "\0" in path or words.is_absolute() or words.parts[:1] == (os.pardir,):
            raise PathNotAllowed(f"{path!r:.200} is not below {root}, from which datasets may be taken.")
        try:
            found = (root / path).resolve(strict=True)
        except FileNotFoundError as error:
            raise DatasetNotFound(f"There is no {path!r:.200} in {root}.") from error
        except (OSError, RuntimeError) as error:  # a name too long; a loop of links
            raise PathNotAllowed(f"{path!r:.200} cannot be followed.") from error
        if not found.is_relative_to(root):
            raise PathNotAllowed(f"{path!r} is not below {root}, from which datasets may be taken.")
        return found

    def _walk(self, start: Path) -> list[str]:
        found: list[str] = []
        for parent, _, names in os.walk(start):  # links to folders are not followed
            found += [(Path(parent) / name).relative_to(start).as_posix() for name in names]
            if len(found) > _MAX_FILES:
                raise DatasetRejected(f"There are more than {_MAX_FILES} files below {start.name}.", errors=[])
        return found


def _chosen(paths: list[str], card: Mapping[str, Any] | None, config: str | None, split: str | None) -> Parts:
    try:
        return choose(paths, card, config, split)
    except PartsNotFound as error:
        raise DatasetRejected(str(error), errors=[]) from error


def _described(parts: Parts) -> dict[str, Any]:
    return {
        "config": parts.config,
        "split": parts.split,
        "files": list(parts.paths),
        "left_out": list(parts.left_out),
    }


def _copy(source: Path, name: str, draft: Draft) -> None:
    target = draft.receive(name)
    try:
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                target.write(chunk)
    except BaseException:
        target.abandon()
        raise
    target.close()


def _hub_files(hub_id: str, revision: str | None) -> tuple[str, list[HubFile]]:
    """Return a repository's commit and its files."""
    from huggingface_hub import HfApi, RepoFile

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=hub_token(), library_name="peft-studio")
    try:
        sha = str(api.dataset_info(hub_id, revision=revision, timeout=30).sha)
        entries = list(api.list_repo_tree(hub_id, repo_type="dataset", revision=sha, recursive=True))
    except Exception as error:
        raise map_hub_error(error, dataset_repo(hub_id)) from error
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    for file in files:
        parts = PurePosixPath(file.path).parts
        if file.path.startswith("/") or "\\" in file.path or ".." in parts:
            raise DatasetRejected(f"{hub_id} lists the file {file.path!r:.100}, which leads out of it.", errors=[])
    return sha, [HubFile(file.path, file.size, file.lfs.sha256 if file.lfs is not None else None) for file in files]


def _download(hub_id: str, sha: str, path: str, folder: Path, bar: Any) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                hub_id,
                path,
                repo_type="dataset",
                revision=sha,
                local_dir=folder,
                tqdm_class=bar,
                endpoint=os.environ.get("HF_ENDPOINT"),
                token=hub_token(),
            )
        )
    except Exception as error:
        raise map_hub_error(error, dataset_repo(hub_id)) from error


def _byte_counter(on_progress: Callable[[str, float | None, int | None, int | None], None]) -> Any:
    """Make a tqdm class that reports bytes over all files instead of drawing."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    done: dict[int, tuple[float, float]] = {}

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
            self._is_bytes = kwargs.get("unit") == "B"
            self._report(float(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            self._report(n or 0)
            return None

        def _report(self, added: float) -> None:
            if not self._is_bytes:
                return
            with lock:
                before = done.get(id(self), (0.0, 0.0))[0]
                done[id(self)] = (before + added, float(self.total or 0))
                finished = int(sum(part for part, _ in done.values()))
                total = int(sum(whole for _, whole in done.values()))
            on_progress("downloading", min(1.0, finished / total) if total else None, finished, total or None)

    return ByteCounter
