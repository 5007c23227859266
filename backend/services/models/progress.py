"""The progress of a load, from the download to the model in memory."""

from collections.abc import Callable
from dataclasses import dataclass

from services.hub.download_flight import Progress


@dataclass(frozen=True)
class LoadProgress:
    """The progress of a load; None where it is not known."""

    fraction: float | None = None
    downloaded_bytes: int | None = None
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    eta_s: float | None = None

    @classmethod
    def of_download(cls, progress: Progress) -> "LoadProgress":
        """Write a download's progress as the load's."""
        left_bytes = progress.total_bytes - progress.done_bytes
        return cls(
            progress.done_bytes / progress.total_bytes if progress.total_bytes else None,
            progress.done_bytes,
            progress.total_bytes,
            progress.bytes_per_s,
            left_bytes / progress.bytes_per_s if progress.bytes_per_s else None,
        )


OnProgress = Callable[[str, LoadProgress], None]  # the state of a load (downloading or loading), and how far it is
