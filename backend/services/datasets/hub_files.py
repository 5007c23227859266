"""Chooses the files of a Hub dataset that make up the requested split, and downloads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import TooLarge
from core.logging import get_logger
from domain.datasets.parts import Parts, choose
from domain.hub.repos import dataset_repo
from services.datasets.imports import Import
from services.hub.download_flight import DownloadCancelled, Progress
from services.hub.downloads import Downloads, Listing

_CARD = "README.md"
_MAX_CARD_BYTES = 4 * 2**20
_log = get_logger(__name__)


@dataclass(frozen=True)
class HubFiles:
    """The downloaded files.

    Attributes:
        commit: The repository's, 40 digits.
        parts: Which files, below the folder.
    """

    commit: str
    parts: Parts
    folder: Path


class HubDatasets:
    """Fetches the files of one split into the Hub's cache.

    Args:
        downloads: Fetches them.
        max_bytes: Larger datasets are refused before they are fetched.
    """

    def __init__(self, downloads: Downloads, max_bytes: int) -> None:
        self._downloads, self._max_bytes = downloads, max_bytes

    def fetch(
        self, hub_id: str, revision: str | None, config: str | None, split: str | None, progress: Import
    ) -> HubFiles:
        """Download the files that this machine lacks.

        Args:
            hub_id: Which dataset.
            revision: Branch, tag or commit; `main` if None.
            config: The configuration; the default one if None.
            split: The split; `train` if None, or the only one.
            progress: The import. It shows the progress, and tells whether it was cancelled.

        Raises:
            ImportCancelled: The import was cancelled. The next import continues with what has arrived.
            DatasetRejected: There is no such configuration or split.
            TooLarge: The files are larger than a dataset may be.
            StorageFull, DownloadCorrupt: As `Downloads.fetch_files` says.
            DatasetNotFound, DatasetGated, AccessDenied, HubUnavailable: The Hub says so, and this machine has no copy.
        """
        try:
            return self._fetch(hub_id, revision, config, split, progress)
        except DownloadCancelled:
            progress.check()
            raise

    def _fetch(
        self, hub_id: str, revision: str | None, config: str | None, split: str | None, progress: Import
    ) -> HubFiles:
        cancelled = progress.cancelled.is_set
        listing = self._downloads.list_files(dataset_repo(hub_id), revision, cancelled)
        sizes = {file.path: file.size_bytes for file in listing.files}
        parts = choose(list(sizes), self._card(listing, sizes, cancelled), config, split)
        progress.total_bytes = sum(sizes[path] for path in parts.paths)
        if progress.total_bytes > self._max_bytes:
            raise TooLarge(f"The files have {progress.total_bytes} bytes; the limit is {self._max_bytes}.")

        def show(download: Progress) -> None:
            progress.received_bytes = download.done_bytes

        folder = self._downloads.fetch_files(listing, parts.paths, show, cancelled)
        # Noted last, so that an import without the Hub gets a commit that is complete.
        self._downloads.cache.note_commit(listing.repo, listing.revision, listing.commit)
        return HubFiles(listing.commit, parts, folder)

    def _card(
        self, listing: Listing, sizes: Mapping[str, int], cancelled: Callable[[], bool]
    ) -> Mapping[str, Any] | None:
        """Return the front matter of the dataset's card, or None if it has none that can be read."""
        if sizes.get(_CARD, _MAX_CARD_BYTES + 1) > _MAX_CARD_BYTES:
            return None
        from huggingface_hub import metadata_load
        from yaml import YAMLError

        folder = self._downloads.fetch_files(listing, [_CARD], lambda _: None, cancelled)
        try:
            card = metadata_load(folder / _CARD)
        except (YAMLError, ValueError) as error:
            _log.warning("dataset_sources.card_not_read", hub_id=listing.repo.id, reason=str(error))
            return None
        return card if isinstance(card, dict) else None
