"""Which models there are: the Hub's, through the cache, and this machine's."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from core.clock import Clock, SystemClock
from core.errors import (
    AccessDenied,
    HubUnavailable,
    ModelNotFound,
    NoSafeWeights,
    SettingRejected,
    TaskNotFound,
)
from core.logging import get_logger
from core.settings import Settings, get_settings
from core.singleton import singleton
from domain.hub.repos import model_repo
from domain.hub.tree import is_commit
from domain.models.config_checks import check_dimensions
from domain.models.records import (
    TASKS,
    DetailsAnswer,
    Fit,
    HubPage,
    ModelDetails,
    ModelSummary,
    RatedModel,
    SearchPage,
    SearchQuery,
    Source,
    check_model_id,
    check_revision,
)
from domain.peft.algorithms import Algorithm
from services.hardware_service import get_machine
from services.hub.cache_dir import hub_cache_dir
from services.hub.client import HubClient, get_hub_client, search_params
from services.hub.downloads import get_downloads
from services.hub.errors import QueryRejected, partly_here
from services.hub.metadata_cache import DETAILS_TTL_S, SEARCH_TTL_S, MetadataCache
from services.models.blockers import blockers_of, is_loadable, local_blockers, no_config
from services.models.embedded import get_embedded_model
from services.models.embedded_listing import embedded_local_model
from services.models.facts import ModelFacts
from services.models.files import ModelFiles
from services.models.fit import fit_of
from services.models.listed_configs import ListedConfigs, config_cache
from services.models.local import LocalModel, LocalModels
from services.models.pickled import get_pickled_models
from services.models.shapes import get_model_shapes

# config.json if it is at hand, the summary, the algorithm's id → the verdict, or None where nothing can be said.
FitOf = Callable[[dict[str, Any] | None, ModelSummary, str], Fit | None]

_PAGES = TypeAdapter(HubPage)
_DETAILS = TypeAdapter(ModelDetails)
_LOCAL_CURSOR = "local:"
_JUDGED_TTL_S = 2.0  # of a page; what is free, and which models are here, changes from second to second
_MAX_JUDGED = 100
_UNREADABLE_TTL_S = 60.0  # a gated model's config: the token's owner may accept its licence any minute
_MAX_LOGGED = 100  # of what is passed over in model folders
_log = get_logger(__name__)


class ModelRegistryService:
    """Answers questions about models.

    Args:
        hub: Asks the Hub.
        cache: Keeps its answers.
        configs: Finds the config.json of the models of a list.
        local: Finds what is on this machine.
        clock: Dates answers that are not the Hub's.
        fit_of: Judges whether a fine-tune fits; None judges nothing.
    """

    def __init__(
        self,
        hub: HubClient,
        cache: MetadataCache,
        configs: ListedConfigs,
        local: LocalModels,
        clock: Clock,
        *,
        fit_of: FitOf | None = None,
    ) -> None:
        self._hub, self._cache, self._configs = hub, cache, configs
        self._local, self._clock, self._fit_of = local, clock, fit_of
        self._judged: dict[SearchQuery, tuple[float, HubPage, tuple[RatedModel, ...]]] = {}

    def search(self, query: SearchQuery) -> SearchPage:
        """Return a page of models; this machine's own where the Hub cannot be reached and nothing is cached.

        Raises:
            SettingRejected: Only fitting models are wanted and nothing judges that here.
            QueryRejected: The cursor is not one.
            HubUnavailable: A later page of the Hub's list is wanted and cannot be had; or it says when to ask again.
        """
        if query.only_fitting and self._fit_of is None:
            raise SettingRejected("only_fitting: whether a model fits is not judged by this server.")
        if query.cursor is not None and query.cursor.startswith(_LOCAL_CURSOR):
            return self._search_local(query)
        params = search_params(query)
        try:
            page = self._cache.get(
                self._key("search", params), _PAGES, lambda etag: self._hub.search(query, etag), lambda _: SEARCH_TTL_S
            )
        except HubUnavailable as error:
            if query.cursor is not None or "retry_after_s" in error.extras:
                raise  # a Hub that says when to ask again is there: this machine's models are no answer in its place
            _log.warning("models.answered_locally", reason=error.detail)
            return self._search_local(query)
        rated = self._judge(page.value, query, ask=not page.stale)
        return SearchPage(rated, page.value.next_cursor, page.source, page.fetched_at, page.stale)

    def popular(self, task: str, limit: int) -> SearchPage:
        """Return a task's most downloaded models.

        Raises:
            TaskNotFound: The Hub has no such task; `tasks` lists those it has.
        """
        if task not in TASKS:
            raise TaskNotFound(f"{task[:100]!r} is not a task of the Hub; `tasks` lists them.", tasks=list(TASKS))
        return self.search(SearchQuery(task=task, sort="downloads", limit=limit))

    def details(self, model_id: str, revision: str | None = None) -> DetailsAnswer:
        """Return one model; from its folder here where the Hub cannot be reached, does not know it or does not say.

        Raises:
            ModelRejected: The id or the revision cannot be one.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says, and the model is not here either.
        """
        local = self._local.find(model_id, revision)
        details, source, fetched_at, stale = self._find_details(model_id, revision, local)
        return DetailsAnswer(details, self._fits(details, local), source, fetched_at, stale)

    def details_of(self, model_id: str, revision: str | None = None) -> ModelDetails:
        """Return one model without judging whether it fits.

        Raises:
            ModelRejected, ModelNotFound, AccessDenied, HubUnavailable: As `details` says.
        """
        return self._find_details(model_id, revision, self._local.find(model_id, revision))[0]

    def log_left_out(self) -> None:
        """Log what is passed over in the operator's model folders, and why."""
        for path, reason in self._local.left_out()[:_MAX_LOGGED]:
            _log.warning("model_folder.left_out", variable="PEFT_STUDIO_MODEL_DIRS", path=str(path), reason=reason)

    def local_models(self) -> tuple[LocalModel, ...]:
        """Return the models on this machine."""
        return self._local.all()

    def resolve_local(self, model_id: str, revision: str | None = None) -> LocalModel | None:
        """Return the model on this machine, at a commit if one is named, or None."""
        return self._local.find(model_id, revision)

    def config_of(self, model_id: str, revision: str | None = None) -> dict[str, Any]:
        """Return a model's config.json, from this machine if the model is here.

        Raises:
            ModelRejected: The id cannot be one, or the model has no config.json with the dimensions of a model.
            ModelGated: Its licence has to be accepted first.
            AccessDenied: The Hub has disabled it, or refuses the token.
            ModelNotFound, HubUnavailable: As the Hub says.
        """
        config = self._config_of(model_id, revision)
        check_dimensions(model_id, config)
        return config

    def blockers_of(self, model_id: str, revision: str | None = None) -> list[str]:
        """Say what keeps a model from being loaded here, a sentence each; of one on this machine, what its folder says.

        Raises:
            ModelRejected: The id or the revision cannot be one.
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
        """
        local = self._local.find(model_id, revision)
        if local is not None:
            return local_blockers(local)
        try:
            details = self._find_details(model_id, revision, None)[0]
        except NoSafeWeights as error:  # the operator's folder of that name, and the Hub has none
            return [error.detail]
        return blockers_of(details, has_token=bool(self._hub.identity))

    def local_configs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the id and config.json of every model on this machine that a load would take."""
        for model in self._local.all():
            if (config := self._local.config(model)) is not None and not local_blockers(model):
                yield model.model_id, config

    def clear_cache(self) -> None:
        """Forget what the Hub said."""
        self._cache.clear()
        self._configs.clear()

    def fit_of_local(self, model: LocalModel) -> Fit | None:
        """Judge a model on this machine, with LoRA."""
        return self._fit(self._local.config(model), model.summary, None, blocked=bool(local_blockers(model)))

    def _config_of(self, model_id: str, revision: str | None) -> dict[str, Any]:
        check_model_id(model_id)
        local = self._local.find(model_id, revision)
        config = self._local.config(local) if local is not None else None
        if config is not None:
            return config
        details = self._find_details(model_id, revision, local)[0]
        if details.config is not None:
            return details.config
        raise no_config(details, has_token=bool(self._hub.identity))

    def _find_details(
        self, model_id: str, revision: str | None, local: LocalModel | None
    ) -> tuple[ModelDetails, Source, datetime, bool]:
        check_model_id(model_id)
        if revision is not None:
            check_revision(revision)
        try:
            cached = self._cache.get(
                self._key("details", [model_id, revision]),
                _DETAILS,
                lambda etag: self._hub.details(model_id, revision, etag),
                lambda details: self._details_ttl_s(details, revision),
            )
        except (HubUnavailable, ModelNotFound, AccessDenied) as error:
            if local is None and revision is not None and isinstance(error, HubUnavailable):
                local = self._local.find_last(model_id, revision)
            if local is None:
                flaw = self._local.flaw(model_id) if revision is None else None
                if flaw is not None:
                    raise flaw from error
                if isinstance(error, HubUnavailable) and (lacking := self._local.lacking(model_id, revision)):
                    raise partly_here(error, model_repo(model_id), lacking) from error
                if unreadable := self._local.unreadable_dirs():  # where it may be
                    raise type(error)(f"{error.detail} {'; '.join(unreadable)}.", **error.extras) from error
                raise
            _log.info("models.answered_locally", model_id=model_id, reason=error.detail)
            details = replace(self._local.details(local), revision=revision or local.revision)
            return details, "local", self._clock.now(), False
        is_here = local is not None or (revision is not None and self._local.find(model_id) is not None)
        details = replace(cached.value, summary=replace(cached.value.summary, local=is_here))
        return details, cached.source, cached.fetched_at, cached.stale

    def _search_local(self, query: SearchQuery) -> SearchPage:
        start = (query.cursor or _LOCAL_CURSOR).removeprefix(_LOCAL_CURSOR) or "0"
        if not (start.isascii() and start.isdecimal() and len(start) <= 9):
            raise QueryRejected("`cursor` is not one that a search returned.")
        models = self._local.search(query)
        begin, end = int(start), int(start) + query.limit
        page = [(model.summary, model) for model in models[begin:end]]
        next_cursor = f"{_LOCAL_CURSOR}{end}" if end < len(models) else None
        return SearchPage(self._rated(page, query, ask=False), next_cursor, "local", self._clock.now(), False)

    def _judge(self, page: HubPage, query: SearchQuery, *, ask: bool) -> tuple[RatedModel, ...]:
        """Judge a page, or repeat the judgement of a moment ago: each model's reads the machine anew."""
        now = self._clock.monotonic()
        known = self._judged.get(query)
        if known is not None and known[1] is page and now - known[0] < _JUDGED_TTL_S:
            return known[2]
        models = [(summary, self._local.find(summary.model_id)) for summary in page.models]
        rated = self._rated(models, query, ask=ask)
        if len(self._judged) >= _MAX_JUDGED:
            self._judged.clear()
        self._judged[query] = now, page, rated
        return rated

    def _rated(
        self, models: Sequence[tuple[ModelSummary, LocalModel | None]], query: SearchQuery, *, ask: bool
    ) -> tuple[RatedModel, ...]:
        """Judge the models of a list, by their config.json: of this machine, of the cache, or of the Hub."""
        summaries = [replace(summary, local=here is not None) for summary, here in models]
        if self._fit_of is None:
            return tuple(RatedModel(summary, None) for summary in summaries)
        configs = self._configs.of([summary for summary, here in models if here is None], ask=ask)
        rated = [
            RatedModel(summary, self._listed_fit(summary, here, configs.get(summary.model_id), query.algorithm))
            for summary, (_, here) in zip(summaries, models, strict=True)
        ]
        if not query.only_fitting:
            return tuple(rated)
        return tuple(model for model in rated if model.fit is not None and model.fit.verdict in ("fits", "tight"))

    def _listed_fit(
        self, summary: ModelSummary, here: LocalModel | None, config: dict[str, Any] | None, algorithm: str | None
    ) -> Fit | None:
        if here is not None:
            return self._fit(self._local.config(here), summary, algorithm, blocked=bool(local_blockers(here)))
        return self._fit(config, summary, algorithm, blocked=config is not None and not is_loadable(summary, config))

    def _fits(self, details: ModelDetails, local: LocalModel | None) -> dict[str, Fit | None]:
        """Judge every algorithm, by what a load would take: the copy on this machine if there is one."""
        if local is None:
            config, blockers = details.config, blockers_of(details, has_token=bool(self._hub.identity))
        else:
            config, blockers = self._local.config(local), local_blockers(local)
        return {
            item.value: self._fit(config, details.summary, item.value, blocked=bool(blockers)) for item in Algorithm
        }

    def _fit(
        self, config: dict[str, Any] | None, summary: ModelSummary, algorithm: str | None, *, blocked: bool
    ) -> Fit | None:
        """Judge a model; what a load would be refused for fits nothing, however little it needs."""
        if self._fit_of is None:
            return None
        fit = self._fit_of(config, summary, algorithm or Algorithm.LORA.value)
        return replace(fit, verdict="unknown") if fit is not None and blocked else fit

    def _details_ttl_s(self, details: ModelDetails, revision: str | None) -> float | None:
        withheld = details.config is None and any(file.path == "config.json" for file in details.files)
        if withheld and details.summary.gated and self._hub.identity:
            return _UNREADABLE_TTL_S
        return None if is_commit(revision) and not withheld else DETAILS_TTL_S

    def _key(self, kind: str, question: object) -> str:
        return json.dumps([kind, self._hub.endpoint, self._hub.identity, question])


def build_model_registry_service(
    settings: Settings, hub: HubClient, *, embedded: Callable[[], LocalModel | None] | None, fit_of: FitOf | None
) -> ModelRegistryService:
    """Build the service on the settings' folders and the environment's Hub."""
    clock = SystemClock()
    local = LocalModels(
        settings.model_dirs,
        prepared_dir=settings.resolved_cache_dir / "models",
        hub_cache_dir=hub_cache_dir,
        embedded=embedded,
    )
    cache = MetadataCache(settings.resolved_cache_dir / "hub", clock)
    configs = ListedConfigs(hub, config_cache(settings.resolved_cache_dir / "hub-configs", clock), clock)
    return ModelRegistryService(hub, cache, configs, local, clock, fit_of=fit_of)


@singleton
def get_model_registry_service() -> ModelRegistryService:
    """Return the process's model registry."""
    return build_model_registry_service(
        get_settings(),
        get_hub_client(),
        embedded=embedded_local_model,
        fit_of=partial(fit_of, get_machine(), get_model_shapes()),
    )


@singleton
def get_model_facts() -> ModelFacts:
    """Return the process's model facts."""
    return ModelFacts(get_model_registry_service(), get_model_shapes())


@singleton
def get_model_files() -> ModelFiles:
    """Return the process's model files."""
    return ModelFiles(get_embedded_model(), get_model_registry_service(), get_downloads(), get_pickled_models())
