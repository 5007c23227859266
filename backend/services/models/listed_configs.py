"""The config.json of each model in a list. They are needed to say which models fit."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from core.clock import Clock
from core.errors import AccessDenied, HubUnavailable, ModelNotFound, ModelRejected, StudioError
from core.logging import get_logger
from core.parallel import start_workers
from domain.hub.tree import is_commit
from domain.models.records import ModelSummary
from services.hub.client import HubClient
from services.hub.metadata_cache import DETAILS_TTL_S, SEARCH_TTL_S, Fetched, MetadataCache

_MAX_CONFIGS, _MAX_REMEMBERED = 10_000, 1000  # on disk, at some 2 kB each, and parsed
_MAX_ASKED = 100  # the length of a list; a mirror may send more
_WORKERS = 8
_LIMIT_S = 4.0  # a list waits no longer; later answers are used the next time
_QUIET_S = 60.0  # no questions for so long after the Hub has failed to answer
_LIBRARIES = frozenset({None, "transformers", "peft", "trl", "unsloth", "safetensors"})
_log = get_logger(__name__)


@dataclass(frozen=True)
class ListedConfig:
    """A config.json; None where there is none, or it may not be read."""

    config: dict[str, Any] | None
    readable: bool


_LISTED = TypeAdapter(ListedConfig)


class ListedConfigs:
    """Finds them in the cache, and asks the Hub once for each of the others.

    Args:
        hub: Asks the Hub.
        cache: Keeps its answers: for good where the list names the commit.
        clock: Measures how long the Hub is left alone.
        limit_s: Seconds that a list waits for them.
    """

    def __init__(self, hub: HubClient, cache: MetadataCache, clock: Clock, *, limit_s: float = _LIMIT_S) -> None:
        self._hub, self._cache, self._clock, self._limit_s = hub, cache, clock, limit_s
        self._quiet_until = float("-inf")

    def of(self, models: Sequence[ModelSummary], *, ask: bool) -> dict[str, dict[str, Any]]:
        """Return model id → config.json, without those that could not be read.

        Args:
            models: Of one list.
            ask: Whether the Hub may be asked; otherwise only what is held is returned.
        """
        wanted = {model.model_id: model for model in models if _may_have_config(model)}
        held = {name: self._cache.peek(self._key(model), _LISTED, _ttl_s(model)) for name, model in wanted.items()}
        configs = {name: cached.value for name, cached in held.items() if cached is not None}
        if ask:
            due = [model for name, model in wanted.items() if (cached := held[name]) is None or cached.stale]
            configs |= self._ask(due[:_MAX_ASKED])
        return {name: listed.config for name, listed in configs.items() if listed.config is not None}

    def clear(self) -> None:
        """Forget them."""
        self._cache.clear()

    def _ask(self, models: Sequence[ModelSummary]) -> dict[str, ListedConfig]:
        """Ask the Hub, several at once, for as long as a list may wait."""
        if not models or self._clock.monotonic() < self._quiet_until:
            return {}
        answers: dict[str, ListedConfig] = {}
        lock = threading.Lock()

        def ask(model: ModelSummary) -> None:
            listed = self._fetch(model)
            if listed is not None:
                with lock:
                    answers[model.model_id] = listed

        deadline = time.monotonic() + self._limit_s
        for worker in start_workers(ask, models, _WORKERS, "listed-config"):
            worker.join(max(0.0, deadline - time.monotonic()))
        with lock:
            return dict(answers)

    def _fetch(self, model: ModelSummary) -> ListedConfig | None:
        if self._clock.monotonic() < self._quiet_until:
            return None
        try:
            return self._cache.get(self._key(model), _LISTED, lambda _: self._upstream(model), _ttl_s(model)).value
        except StudioError as error:
            _log.info("listed_configs.not_had", model_id=model.model_id, reason=error.detail)
            return None

    def _upstream(self, model: ModelSummary) -> Fetched[ListedConfig]:
        try:
            config = self._hub.listed_config(model.model_id, model.sha or "main")
            return Fetched(ListedConfig(config, readable=True), None)
        except ModelRejected:
            return Fetched(ListedConfig(None, readable=True), None)
        except (AccessDenied, ModelNotFound):
            return Fetched(ListedConfig(None, readable=False), None)
        except HubUnavailable:
            self._quiet_until = self._clock.monotonic() + _QUIET_S
            raise

    def _key(self, model: ModelSummary) -> str:
        return json.dumps(["config", self._hub.endpoint, self._hub.identity, model.model_id, model.sha])


def config_cache(folder: Path, clock: Clock) -> MetadataCache:
    """Make a cache for many small answers."""
    return MetadataCache(folder, clock, max_entries=_MAX_CONFIGS, max_remembered=_MAX_REMEMBERED)


def _ttl_s(model: ModelSummary) -> Callable[[ListedConfig], float | None]:
    """A config that cannot be read may be readable soon. It is asked for again when the list is."""
    known = None if is_commit(model.sha) else DETAILS_TTL_S
    return lambda listed: known if listed.readable else SEARCH_TTL_S


def _may_have_config(model: ModelSummary) -> bool:
    return model.architecture is not None or model.library in _LIBRARIES
