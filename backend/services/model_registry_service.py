"""Models, wherever they are: the Hub through a cache, and this machine when the Hub cannot be reached."""

import json
import re
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from core.clock import Clock, SystemClock
from core.errors import HubUnavailable, ModelRejected, TaskNotFound
from core.settings import Settings, get_settings
from core.singleton import singleton
from domain.model_records import ModelDetails, ModelFile, ModelSummary, SearchQuery, details_from_hub, summary_from_hub
from services import embedded_model
from services.hub_client import HubAnswer, HubClient
from services.local_models import LocalModel, LocalModels
from services.metadata_cache import FOREVER, MetadataCache

SEARCH_TTL_S = 3600.0
DETAILS_TTL_S = 86400.0
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_SHA = re.compile(r"[0-9a-f]{40}")
# Source: the Hub's pipeline tags (huggingface.js, packages/tasks), text and what a causal model can serve.
TASKS = (
    "text-generation", "text-classification", "token-classification", "question-answering", "summarization",
    "translation", "fill-mask", "sentence-similarity", "feature-extraction", "zero-shot-classification",
    "table-question-answering", "image-text-to-text", "visual-question-answering", "image-classification",
    "image-to-text", "text-to-image", "object-detection", "automatic-speech-recognition", "text-to-speech",
    "audio-classification", "any-to-any",
)  # fmt: skip

Source = Literal["hub", "cache", "local"]


@dataclass(frozen=True)
class SearchPage:
    """One page of models, and how fresh it is."""

    models: list[ModelSummary]
    next_cursor: str | None
    source: Source
    fetched_at: datetime
    stale: bool


class ModelRegistryService:
    """Searches and describes models."""

    def __init__(self, hub: HubClient, cache: MetadataCache, local: LocalModels, clock: Clock) -> None:
        self._hub, self._cache, self._local, self._clock = hub, cache, local, clock

    def search(self, query: SearchQuery) -> SearchPage:
        """List models from the Hub, or what is on this machine when it cannot be reached."""
        question = "search " + json.dumps(asdict(query), sort_keys=True)
        try:
            cached = self._cache.get(question, SEARCH_TTL_S, lambda etag: self._hub.search(query, etag))
        except HubUnavailable:
            return self._search_local(query)
        here = {model.summary.model_id for model in self._local.all()}
        models = [summary_from_hub(payload) for payload in cached.document]
        models = [replace(model, local=model.model_id in here) for model in models]
        source: Source = "hub" if cached.from_hub else "cache"
        return SearchPage(models, cached.next_cursor, source, cached.fetched_at, cached.stale)

    def _search_local(self, query: SearchQuery) -> SearchPage:
        models = [model.summary for model in self._local.all() if _matches(model.summary, query)]
        return SearchPage(models[: query.limit], None, "local", self._clock.now(), stale=False)

    def popular(self, task: str, limit: int) -> SearchPage:
        """List the most downloaded models of a task.

        Raises:
            TaskNotFound: The Hub has no such task; `tasks` lists those it has.
        """
        if task not in TASKS:
            raise TaskNotFound(f"There is no task {task!r:.60}. Known are: {', '.join(TASKS)}.", tasks=list(TASKS))
        query = SearchQuery(None, task, None, None, (), None, None, None, None, "downloads", limit, None)
        return self.search(query)

    def details(self, model_id: str, revision: str | None) -> ModelDetails:
        """Describe a model.

        Raises:
            ModelRejected: The id is not one the Hub could have.
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        check_model_id(model_id)
        here = self._local.find(model_id)
        try:
            payload, config = self._payload(model_id, revision)
        except HubUnavailable:
            if here is None or revision is not None:
                raise
            return _local_details(here)
        found = details_from_hub(payload, config, revision)
        return replace(found, summary=replace(found.summary, local=here is not None))

    def config_of(self, model_id: str, revision: str | None) -> dict[str, Any]:
        """Return a model's config.json, from this machine if it is here.

        Raises:
            ModelRejected: It has none.
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        check_model_id(model_id)
        here = self._local.find(model_id) if revision is None else None
        if here is not None:
            return here.config
        _, config = self._payload(model_id, revision)
        if config is None:
            raise ModelRejected(f"{model_id} has no config.json, so it is no transformers model.")
        return config

    def _payload(self, model_id: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        ttl_s = FOREVER if revision is not None and _SHA.fullmatch(revision) else DETAILS_TTL_S
        question = f"model {model_id} {revision or ''}"
        payload = self._cache.get(question, ttl_s, lambda etag: self._hub.model(model_id, revision, etag)).document
        names = {item.get("rfilename") for item in payload.get("siblings") or ()}
        sha = payload.get("sha")
        if "config.json" not in names or not isinstance(sha, str):
            return payload, None

        def fetch(_etag: str | None) -> HubAnswer:
            return HubAnswer({"config": self._hub.config(payload.get("id", model_id), sha)}, None, None)

        return payload, self._cache.get(f"config {model_id} {sha}", FOREVER, fetch).document["config"]

    def local_models(self) -> list[LocalModel]:
        """Return what is on this machine."""
        return self._local.all()

    def local_path(self, model_id: str) -> Path | None:
        """Return the folder of a model that is on this machine, or None."""
        return self._local.local_path(model_id)

    def clear_cache(self) -> None:
        """Forget what the Hub said."""
        self._cache.clear()


def check_model_id(model_id: str) -> None:
    """Refuse an id that the Hub could not have.

    Raises:
        ModelRejected: Source: huggingface_hub's validate_repo_id.
    """
    if not _MODEL_ID.fullmatch(model_id) or len(model_id) > 96 or "--" in model_id or ".." in model_id:
        raise ModelRejected(f"{model_id!r:.120} is not a model id: it must read owner/name.")


def _matches(model: ModelSummary, query: SearchQuery) -> bool:
    """Filter local models; a model of which a filtered field is unknown does not match."""
    wanted = (
        (query.task, model.task),
        (query.author, model.author),
        (query.library, model.library),
        (query.license, model.license),
    )
    if any(want is not None and want != have for want, have in wanted):
        return False
    if query.query and query.query.lower() not in model.model_id.lower():
        return False
    if query.gated is not None and bool(model.gated) != query.gated:
        return False
    if not set(query.tags) <= set(model.tags):
        return False
    low, high = query.min_parameters, query.max_parameters
    if low is None and high is None:
        return True
    return model.parameters is not None and (low or 0) <= model.parameters <= (high or model.parameters)


def _local_details(model: LocalModel) -> ModelDetails:
    files: tuple[ModelFile, ...] = ()
    template: bool | None = None
    if model.path is not None:
        present = [path for path in sorted(model.path.iterdir()) if path.is_file()]
        files = tuple(ModelFile(path.name, path.stat().st_size) for path in present)
        template = any(path.name == "chat_template.jinja" for path in present)
    return ModelDetails(
        summary=model.summary,
        sha=None,
        revision=None,
        files=files,
        parameters_by_dtype=None,
        config=model.config,
        chat_template=template,
        base_model=None,
        languages=(),
        requires_remote_code=bool(model.config.get("auto_map")),
    )


def embedded_local_model() -> LocalModel:
    """Describe the embedded model as the registry shows it, prepared or not."""
    summary = ModelSummary(
        model_id=embedded_model.MODEL_ID,
        author="HuggingFaceTB",
        downloads=None,
        likes=None,
        task="text-generation",
        library="transformers",
        tags=("embedded",),
        license="apache-2.0",
        gated=False,
        parameters=embedded_model.PARAMETERS,
        size_bytes=embedded_model.SIZE_BYTES,
        architecture="LlamaForCausalLM",
        created_at=None,
        modified_at=None,
        local=True,
    )
    return LocalModel(summary, embedded_model.get_embedded_model().path, dict(embedded_model.CONFIG))


def build_model_registry_service(settings: Settings) -> ModelRegistryService:
    """Wire the registry."""
    clock = SystemClock()
    local = LocalModels(settings.model_dirs, embedded_local_model)
    cache = MetadataCache(settings.resolved_cache_dir / "hub", clock)
    return ModelRegistryService(HubClient(time.sleep), cache, local, clock)


@singleton
def get_model_registry_service() -> ModelRegistryService:
    """Return the process's registry."""
    return build_model_registry_service(get_settings())
