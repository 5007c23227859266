"""A registry, and downloads, on the Hub's double, as a fresh process would make them."""

from collections.abc import Callable
from pathlib import Path

from services.hub.cache_dir import HubCacheDir
from services.hub.client import HubClient
from services.hub.downloads import Downloads
from services.hub.http import HubHttp
from services.hub.metadata_cache import MetadataCache
from services.model_registry_service import FitOf, ModelRegistryService
from services.models.listed_configs import ListedConfigs, config_cache
from services.models.local import LocalModel, LocalModels
from tests.support.hub_double import HubDouble, ManualClock


def make_registry(
    hub: HubDouble,
    folder: Path,
    clock: ManualClock,
    *,
    fit_of: FitOf | None = None,
    embedded: Callable[[], LocalModel | None] | None = None,
    hub_cache_dir: Callable[[], Path | None] = lambda: None,
    limit_s: float = 30,
) -> ModelRegistryService:
    """Make one with its caches, `models/` and `prepared/` below a folder; what registries share is there."""
    client = HubClient(HubHttp(clock, clock.sleep, endpoint=hub.url))
    local = LocalModels(
        [folder / "models"], prepared_dir=folder / "prepared", hub_cache_dir=hub_cache_dir, embedded=embedded
    )
    configs = ListedConfigs(client, config_cache(folder / "configs", clock), clock, limit_s=limit_s)
    return ModelRegistryService(client, MetadataCache(folder / "cache", clock), configs, local, clock, fit_of=fit_of)


def make_downloads(
    hub: HubDouble,
    folder: Path,
    clock: ManualClock,
    *,
    free_bytes: Callable[[Path], int] | None = None,
    answer_timeout_s: float = 15.0,
    timeout_s: float | None = None,
) -> Downloads:
    """Make them with the Hub's cache in `hub/` below a folder."""
    http = HubHttp(clock, clock.sleep, endpoint=hub.url, timeout_s=answer_timeout_s)
    cache = HubCacheDir(lambda: folder / "hub", folder / "verified", free_bytes)
    return Downloads(http, HubClient(http), cache, clock, clock.sleep, timeout_s=timeout_s)
