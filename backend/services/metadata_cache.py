"""What the Hub said, on the disk: fresh for a while, revalidated after, stale when the Hub cannot be reached."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.clock import Clock
from core.errors import HubUnavailable
from core.files import write_atomic
from core.logging import get_logger
from services.hub_client import HubAnswer

_log = get_logger(__name__)
FOREVER = float("inf")


@dataclass(frozen=True)
class Cached:
    """A document with its age. `from_hub` tells whether the Hub was asked for this answer."""

    document: Any
    next_cursor: str | None
    fetched_at: datetime
    stale: bool
    from_hub: bool


@dataclass(frozen=True)
class _Entry:
    document: Any
    next_cursor: str | None
    etag: str | None
    fetched_at: datetime


class MetadataCache:
    """One JSON file a question. Survives restarts; a file that cannot be read is fetched again."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder, self._clock = folder, clock
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def get(self, question: str, ttl_s: float, fetch: Callable[[str | None], HubAnswer]) -> Cached:
        """Answer from the cache while fresh; otherwise ask, once however many threads want to know.

        Args:
            question: What is asked; part of no file name.
            ttl_s: Seconds an answer is fresh.
            fetch: Asks the Hub, given the ETag of the stale answer; a None document means "not modified".

        Raises:
            HubUnavailable: The Hub cannot be asked and nothing is cached.
            StudioError: Whatever else `fetch` raises.
        """
        key = hashlib.sha256(question.encode()).hexdigest()
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            entry = self._read(key)
            if entry is not None and self._age_s(entry) < ttl_s:
                return Cached(entry.document, entry.next_cursor, entry.fetched_at, stale=False, from_hub=False)
            try:
                answer = fetch(entry.etag if entry is not None else None)
            except HubUnavailable:
                if entry is None:
                    raise
                return Cached(entry.document, entry.next_cursor, entry.fetched_at, stale=True, from_hub=False)
            fresh = self._keep(key, entry, answer)
            return Cached(fresh.document, fresh.next_cursor, fresh.fetched_at, stale=False, from_hub=True)

    def clear(self) -> None:
        """Forget everything."""
        for file in self._folder.glob("*.json"):
            file.unlink(missing_ok=True)

    def _age_s(self, entry: _Entry) -> float:
        # A clock set back must not make an answer fresh for a year.
        age = (self._clock.now() - entry.fetched_at).total_seconds()
        return age if age >= 0 else FOREVER

    def _keep(self, key: str, stale: _Entry | None, answer: HubAnswer) -> _Entry:
        now = self._clock.now()
        if answer.document is None and stale is not None:
            fresh = _Entry(stale.document, stale.next_cursor, stale.etag, now)
        else:
            fresh = _Entry(answer.document, answer.next_cursor, answer.etag, now)
        self._folder.mkdir(parents=True, exist_ok=True)
        content = fresh.__dict__ | {"fetched_at": now.isoformat()}
        write_atomic(self._folder / f"{key}.json", json.dumps(content).encode())
        return fresh

    def _read(self, key: str) -> _Entry | None:
        file = self._folder / f"{key}.json"
        try:
            content = json.loads(file.read_bytes())
            fetched_at = datetime.fromisoformat(content["fetched_at"]).astimezone(UTC)
            return _Entry(content["document"], content["next_cursor"], content["etag"], fetched_at)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("metadata_cache.corrupt", file=file.name, error=str(error))
            return None
