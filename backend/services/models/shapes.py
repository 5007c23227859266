"""What models are made of, from their config.json: asked of an engine that holds no model, and kept on disk."""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from core.clock import SystemClock
from core.errors import EngineFailed, EngineUnavailable
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.models.config_reader import NotKnown
from domain.models.shape import ModelShape
from domain.models.storage import as_published
from domain.results import Described
from services.engine_service import get_engines
from services.engines.process import EngineProcess
from services.hub.metadata_cache import Fetched, MetadataCache
from services.models.embedded import CONFIG as EMBEDDED_CONFIG
from services.models.embedded import MODEL_ID
from services.models.embedded_shape import EMBEDDED_SHAPE

_FORMAT = 5  # of a shape; one that was kept with another number is made again
_LIMIT_S = 60.0  # of processor time for one description; the largest model takes a few seconds
_WAITED = 10  # times as long on the clock, for an engine that waits for something that does not come
_LOOK_S = 1.0
_IDLE_S = 120.0  # an engine that describes nothing for so long is ended
_MAX_WAITING = 200  # in the background
_SAYS_NOTHING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config"})
_KEPT = TypeAdapter(Described)
_log = get_logger(__name__)


class Shapes(Protocol):
    """Tells what models are made of."""

    def describe(self, config: Mapping[str, Any]) -> Described:
        """Describe a model by its config.json."""
        ...

    def known(self, config: Mapping[str, Any]) -> ModelShape | None:
        """Return a model's shape at once, or None where it is not known yet."""
        ...


class _Unanswered(Exception):
    """The engine did not answer: what it would have said is not known, and not kept."""


class ModelShapes:
    """Describes models.

    Args:
        cache: Keeps the descriptions: by the configuration, and by transformers' version.
        start: Starts an engine.
        limit_s: Seconds of processor time for one description; a stranger's config.json may be made to take long. An
            engine that gets little of a busy machine's time is no slower by that measure.
        idle_s: Seconds after which an engine without work is ended.
    """

    def __init__(
        self,
        cache: MetadataCache,
        start: Callable[[], EngineProcess],
        *,
        limit_s: float = _LIMIT_S,
        idle_s: float = _IDLE_S,
    ) -> None:
        self._cache, self._start, self._limit_s, self._idle_s = cache, start, limit_s, idle_s
        self._lock = threading.Lock()  # held while the engine works: it does one thing at a time
        self._process: EngineProcess | None = None
        self._idle: threading.Timer | None = None
        self._waiting: queue.Queue[Mapping[str, Any]] = queue.Queue(_MAX_WAITING)
        self._worker_lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._closed = False

    def describe(self, config: Mapping[str, Any]) -> Described:
        """Describe a model; the first time takes seconds.

        Args:
            config: Its config.json, with dimensions that some model could have.
        """
        if config == EMBEDDED_CONFIG:
            return EMBEDDED_SHAPE
        try:
            said = self._cache.get(
                shape_key(config), _KEPT, lambda _: Fetched(self._ask(config), None), lambda _: None
            ).value
        except _Unanswered as error:
            said = Described(shape=None, problem=str(error))
        return _as_published(said, config)

    def known(self, config: Mapping[str, Any]) -> ModelShape | None:
        """Return a model's shape if it has been described before. It is described in the background if not."""
        if config == EMBEDDED_CONFIG:
            return EMBEDDED_SHAPE.shape
        kept = self._cache.peek(shape_key(config), _KEPT, lambda _: None)
        if kept is not None:
            return _as_published(kept.value, config).shape
        self._later(config)
        return None

    def close(self) -> None:
        """End the engine; no description is begun after that."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _ask(self, config: Mapping[str, Any]) -> Described:
        with self._lock:
            if self._closed:
                raise _Unanswered("the server is ending")
            if self._idle is not None:
                self._idle.cancel()
            try:
                if self._process is None or not self._process.alive:
                    self._process = self._start()
                return self._answer(self._process, config)
            except FutureTimeout as error:
                self._end()
                raise _Unanswered(f"describing it took longer than {self._limit_s:g} s of processor time") from error
            except (EngineFailed, EngineUnavailable) as error:
                _log.warning("shapes.not_described", reason=error.detail)
                raise _Unanswered(f"describing it failed: {error.detail}") from error
            finally:
                self._idle = threading.Timer(self._idle_s, self._end_idle)
                self._idle.daemon = True
                self._idle.start()

    def _answer(self, process: EngineProcess, config: Mapping[str, Any]) -> Described:
        """Wait for an engine's description.

        Raises:
            TimeoutError: It has used up its time.
        """
        end_s, spent_s = time.monotonic() + _WAITED * self._limit_s, process.processor_s()
        answer = process.request(protocol.Describe(config=dict(config)))
        while True:
            try:
                return answer.result(min(_LOOK_S, self._limit_s))
            except FutureTimeout:
                if process.processor_s() - spent_s >= self._limit_s or time.monotonic() >= end_s:
                    raise

    def _end_idle(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def _end(self) -> None:
        process, self._process = self._process, None
        if self._idle is not None:
            self._idle.cancel()
        if process is not None:
            process.kill()
            process.close()

    def _later(self, config: Mapping[str, Any]) -> None:
        """Describe a model in the background. What finds no room is asked for again by the next list."""
        with suppress(queue.Full):
            self._waiting.put_nowait(config)
        with self._worker_lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="shapes", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        while not self._closed:
            try:
                config = self._waiting.get(timeout=1.0)
            except queue.Empty:
                return
            self.describe(config)


def shape_config(model_id: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what to describe of a listed model: of the embedded one, what is known of it beforehand."""
    return EMBEDDED_CONFIG if model_id == MODEL_ID else config


def shape_key(config: Mapping[str, Any]) -> str:
    """Return the key that a description is kept under: the configuration and what would describe it."""
    about = {name: value for name, value in config.items() if name not in _SAYS_NOTHING}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"shape {_FORMAT} {version('transformers')} {digest}"


def shape_cache(folder: Path) -> MetadataCache:
    """Make the cache that descriptions are kept in."""
    return MetadataCache(folder / "shapes", SystemClock(), max_remembered=1000)


def _as_published(said: Described, config: Mapping[str, Any]) -> Described:
    """Add how this checkpoint holds the weights."""
    if said.shape is None:
        return said
    try:
        return said.model_copy(update={"shape": as_published(said.shape, config)})
    except NotKnown as error:
        return Described(shape=None, problem=f"how its weights are stored is not known here: {error}")


@singleton
def get_model_shapes() -> ModelShapes:
    """Return the process's model shapes."""
    settings = get_settings()
    log = settings.home / "logs" / "shapes.log"
    engines = get_engines()
    return ModelShapes(shape_cache(settings.resolved_cache_dir), lambda: engines.take(log, backend="none"))
