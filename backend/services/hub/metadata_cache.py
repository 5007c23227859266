"""The Hub's answers, cached on disk. They are revalidated after a while, and served stale if the Hub is away."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from core import telemetry
from core.clock import Clock
from core.errors import HubUnavailable, StorageFull
from core.files import write_atomic
from core.logging import get_logger
from domain.hub.wire import moment, text

T = TypeVar("T")
Stamp = tuple[int, int, int, int]  # changes with a file's content
SEARCH_TTL_S = 3600.0
DETAILS_TTL_S = 86400.0
_FORMAT = 1  # version of the files; an entry with another number is fetched again
_MAX_ENTRIES = 2000  # searches differ endlessly; at 20-100 kB each this stays below 200 MB
_MAX_REMEMBERED = 64  # entries that are kept parsed, so that frequent questions parse no file
_log = get_logger(__name__)


@dataclass(frozen=True)
class Fetched(Generic[T]):
    """An upstream answer. `value` is None where the value of the sent `etag` is still valid (HTTP 304)."""

    value: T | None
    etag: str | None


@dataclass(frozen=True)
class Cached(Generic[T]):
    """A value with when the Hub last confirmed it. `source` is hub if that was during this call."""

    value: T
    fetched_at: datetime
    source: Literal["hub", "cache"]
    stale: bool


@dataclass(frozen=True)
class _Entry(Generic[T]):
    value: T
    etag: str | None
    fetched_at: datetime


@dataclass(frozen=True)
class _Remembered:
    """An entry as it was parsed from a file."""

    stamp: Stamp
    adapter: TypeAdapter[Any]
    entry: _Entry[Any]


class MetadataCache:
    """One JSON file for each key. A parsed entry is remembered until its file changes.

    Args:
        folder: Holds the files. It is created at the first write.
        clock: Entries outlive the process, so their age comes from the wall clock.
        max_entries: The oldest files beyond this number are deleted.
        max_remembered: Entries that are kept parsed in memory.
    """

    def __init__(
        self, folder: Path, clock: Clock, *, max_entries: int = _MAX_ENTRIES, max_remembered: int = _MAX_REMEMBERED
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._max_entries, self._max_remembered = max_entries, max_remembered
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._lock = threading.Lock()
        self._flights: dict[str, Future[Cached[Any]]] = {}

    def get(
        self,
        key: str,
        adapter: TypeAdapter[T],
        fetch: Callable[[str | None], Fetched[T]],
        ttl_s: Callable[[T], float | None],
    ) -> Cached[T]:
        """Return the value of a key. Threads that ask at the same time share one upstream request.

        Args:
            key: Identifies the question. The file's name is its hash.
            adapter: Validates what was read from disk.
            fetch: Asks upstream. It takes the ETag of the cached value.
            ttl_s: Seconds a value stays fresh; None for ever.

        Raises:
            HubUnavailable: Upstream cannot be reached and nothing is cached.
            Exception: Any other error of `fetch`. Nothing is stored.
        """
        with self._lock:
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not leads:
            return flight.result()
        try:
            result = self._resolve(key, adapter, fetch, ttl_s)
        except BaseException as error:
            flight.set_exception(error)
            raise
        else:
            flight.set_result(result)
            return result
        finally:
            with self._lock:
                del self._flights[key]

    def peek(self, key: str, adapter: TypeAdapter[T], ttl_s: Callable[[T], float | None]) -> Cached[T] | None:
        """Return the cached value of any age without asking upstream. `stale` says that it is past its time."""
        held = self._read(key, adapter)
        if held is None:
            return None
        return Cached(held.value, held.fetched_at, "cache", stale=not self._is_fresh(held, ttl_s(held.value)))

    def clear(self) -> None:
        """Forget every entry."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with self._lock:
            self._remembered.clear()

    def _resolve(
        self,
        key: str,
        adapter: TypeAdapter[T],
        fetch: Callable[[str | None], Fetched[T]],
        ttl_s: Callable[[T], float | None],
    ) -> Cached[T]:
        held = self._read(key, adapter)
        if held is not None and self._is_fresh(held, ttl_s(held.value)):
            telemetry.cache_lookups.labels("hit").inc()
            return Cached(held.value, held.fetched_at, "cache", stale=False)
        try:
            fetched = fetch(held.etag if held is not None else None)
        except HubUnavailable as error:
            if held is None:
                telemetry.cache_lookups.labels("miss").inc()
                raise
            telemetry.cache_lookups.labels("stale").inc()
            _log.warning("metadata_cache.stale", fetched_at=held.fetched_at.isoformat(), reason=error.detail)
            return Cached(held.value, held.fetched_at, "cache", stale=True)
        value = fetched.value if fetched.value is not None else held.value if held is not None else None
        if value is None:
            raise HubUnavailable("The Hub answered that nothing has changed, but nothing was held.")
        telemetry.cache_lookups.labels("miss").inc()
        now = self._clock.now()
        self._write(key, adapter, _Entry(value, fetched.etag, now))
        return Cached(value, now, "hub", stale=False)

    def _is_fresh(self, entry: _Entry[Any], ttl_s: float | None) -> bool:
        if ttl_s is None:
            return True
        age = self._clock.now() - entry.fetched_at
        # An entry from the future was written before the clock was set back. Its age is not known.
        return timedelta(0) <= age < timedelta(seconds=ttl_s)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _files(self) -> list[Path]:
        return list(self._folder.glob("*.json")) if self._folder.is_dir() else []

    def _read(self, key: str, adapter: TypeAdapter[T]) -> _Entry[T] | None:
        path = self._path(key)
        try:
            with path.open("rb") as file:
                stamp = _stamp(os.fstat(file.fileno()))
                remembered = self._recall(path.name, stamp, adapter)
                if remembered is not None:
                    return remembered
                content = file.read()
            raw = from_json(content)
            if not isinstance(raw, dict) or raw.get("format") != _FORMAT or raw.get("key") != key:
                raise ValueError("not an entry of this cache for this key")
            fetched_at = moment(raw.get("fetched_at"))
            if fetched_at is None:
                raise ValueError("no time of fetching")
            entry = _Entry(adapter.validate_python(raw.get("value")), text(raw.get("etag")), fetched_at)
            self._remember(path.name, _Remembered(stamp, adapter, entry))
            return entry
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:  # pydantic's ValidationError is a ValueError
            _log.warning("metadata_cache.rebuilt", file=path.name, reason=str(error)[:300])
            return None

    def _recall(self, name: str, stamp: Stamp, adapter: TypeAdapter[T]) -> _Entry[T] | None:
        with self._lock:
            held = self._remembered.get(name)
            if held is None or held.stamp != stamp or held.adapter is not adapter:
                return None
            self._remembered.move_to_end(name)
            return held.entry

    def _remember(self, name: str, read: "_Remembered") -> None:
        with self._lock:
            self._remembered[name] = read
            while len(self._remembered) > self._max_remembered:
                self._remembered.popitem(last=False)

    def _write(self, key: str, adapter: TypeAdapter[T], entry: _Entry[T]) -> None:
        content = to_json(
            {
                "format": _FORMAT,
                "key": key,
                "etag": entry.etag,
                "fetched_at": entry.fetched_at.isoformat(),
                "value": entry.value,
            },
            inf_nan_mode="constants",  # some config.json files hold Infinity
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self._path(key)
            write_atomic(path, content)
            self._remember(path.name, _Remembered(_stamp(path.stat()), adapter, entry))
            self._prune()
        except (StorageFull, OSError) as error:
            # The caller has its answer. If the disk cannot keep it, only the next question is slower.
            _log.warning("metadata_cache.not_kept", reason=str(error))

    def _prune(self) -> None:
        files = self._files()
        if len(files) <= self._max_entries:
            return
        # The oldest half goes at once, so that not every write has to delete.
        for _, path in sorted((path.stat().st_mtime, path) for path in files)[: len(files) - self._max_entries // 2]:
            path.unlink(missing_ok=True)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
