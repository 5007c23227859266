"""Takes models off this machine, unless something here needs them."""

import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from core.errors import Conflict, ModelNotFound, PathNotAllowed, StudioError
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain.hub.repos import model_repo
from domain.jobs import export_states
from domain.jobs.export_states import ExportState
from domain.jobs.states import FINAL_STATES, JobState
from domain.models.records import check_model_id
from services.hub.cache_dir import cached_repo, hub_cache_dir
from services.models.folders import model_folder
from services.peft_service import PeftService, get_peft_service
from store.database import Database, get_database
from store.records import AdapterRecord, JobRecord
from store.repositories import Adapters, Exports, Jobs

_DELETED = ".deleted"  # ends the name of a folder that is on its way out; a name that begins with a dot is no model's
_NAMED = 5  # of each kind, in a sentence
_log = get_logger(__name__)


class ModelInUse(Conflict):
    """Something on this machine needs the model's files."""

    slug, title = "model-in-use", "Model in use"


@dataclass(frozen=True)
class ModelUse:
    """What there is of a model on this machine, and what needs it.

    Attributes:
        cached: Its folder in the Hub's cache, or None.
        prepared: The folder in which this service prepared or converted it, or None.
        operators: Its folder among those of PEFT_STUDIO_MODEL_DIRS, which is never deleted, or None.
        loaded: Ids of loaded models on it.
        jobs: Jobs on it that have not ended.
        exports: Ids of exports that have not ended, of adapters on it.
        adapters: Adapters that have it as their base.
    """

    cached: Path | None
    prepared: Path | None
    operators: Path | None
    loaded: list[str]
    jobs: list[JobRecord]
    exports: list[str]
    adapters: list[AdapterRecord]

    @property
    def is_deletable(self) -> bool:
        """Whether there are files of it that may be deleted."""
        return self.cached is not None or self.prepared is not None

    @cached_property
    def size_bytes(self) -> int:
        """The size of the files that may be deleted; what other repositories of the cache share is not counted."""
        files = (path for folder in (self.cached, self.prepared) if folder is not None for path in folder.rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())

    @property
    def is_held(self) -> bool:
        """Whether something needs its files now."""
        return bool(self.loaded or self.jobs or self.exports)


class ModelRemovalService:
    """Deletes models: what came from the Hub, and what was prepared or converted here.

    Args:
        database: Has the jobs, adapters and exports that may need a model.
        peft: Has the loaded models.
        model_dirs: The operator's folders.
        prepared_dir: Where models are prepared, `owner--name` below it.
        cache_dir: Where huggingface_hub keeps downloads.
    """

    def __init__(
        self,
        database: Database,
        peft: PeftService,
        model_dirs: Sequence[Path],
        prepared_dir: Path,
        cache_dir: Callable[[], Path] = hub_cache_dir,
    ) -> None:
        self._database, self._peft = database, peft
        self._model_dirs, self._prepared_dir, self._cache_dir = tuple(model_dirs), prepared_dir, cache_dir

    def use_of(self, model_id: str) -> ModelUse:
        """Return what there is of a model here, and what needs it.

        Raises:
            ModelRejected: The id cannot be one.
        """
        check_model_id(model_id)
        cached = cached_repo(self._cache_dir(), model_repo(model_id))
        operators = [model_folder(root.expanduser(), model_id.split("/")) for root in self._model_dirs]
        with self._database.begin() as connection:
            adapters = [record for record in Adapters(connection).all() if record.base_model_id == model_id]
            jobs = Jobs(connection).all(frozenset(JobState) - FINAL_STATES)
            exports = Exports(connection).all(None, frozenset(ExportState) - export_states.FINAL_STATES)
        adapter_ids = {record.id for record in adapters}
        return ModelUse(
            cached if cached.is_dir() else None,
            model_folder(self._prepared_dir, [model_id.replace("/", "--", 1)]),
            next((folder for folder in operators if folder is not None), None),
            [model.id for model in self._peft.models() if model.model_id == model_id],
            [job for job in jobs if job.model_id == model_id],
            [export.id for export in exports if export.adapter_id in adapter_ids],
            adapters,
        )

    def delete(self, model_id: str, *, force: bool = False) -> None:
        """Delete a model's files, in every revision.

        Args:
            model_id: Which model.
            force: Delete it although adapters have it as their base. What uses them downloads it again.

        Raises:
            ModelRejected: The id cannot be one.
            ModelNotFound: There are no files of it here.
            PathNotAllowed: They lie in a folder of PEFT_STUDIO_MODEL_DIRS.
            ModelInUse: It is loaded, a job or an export that has not ended needs it, or adapters do.
        """
        use = self.use_of(model_id)
        if not use.is_deletable:
            if use.operators is not None:
                raise PathNotAllowed(f"{use.operators} is in PEFT_STUDIO_MODEL_DIRS: its models are the operator's.")
            raise ModelNotFound(f"There are no files of {model_id} on this machine.")
        _refuse_in_use(model_id, use, force=force)
        try:
            if use.prepared is not None:
                self._delete_prepared(model_id, use.prepared)
            if use.cached is not None:
                _delete_cached(use.cached)
        except OSError as error:
            raise StudioError(f"{model_id} could not be deleted: {error.strerror}: {error.filename}.") from error
        _log.info("model.deleted", model_id=model_id, cached=str(use.cached), prepared=str(use.prepared))

    def _delete_prepared(self, model_id: str, folder: Path) -> None:
        from filelock import FileLock, Timeout  # a dependency of huggingface_hub; 20 ms that most starts do not need

        try:
            with FileLock(f"{folder}.lock", timeout=0):
                folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{_DELETED}"))
        except Timeout as error:
            raise ModelInUse(f"{model_id} is being prepared; try again when it is done.") from error
        for path in folder.parent.glob(f".*{_DELETED}"):  # also what a server that was killed has left
            shutil.rmtree(path)


def _delete_cached(folder: Path) -> None:
    """Delete a repository from the Hub's cache, as `hf cache rm` does: what it shares with others stays."""
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(folder.parent)
    commits = [each.commit_hash for repo in cache.repos if repo.repo_path == folder for each in repo.revisions]
    cache.delete_revisions(*commits).execute()
    if folder.is_dir():  # a part of a download, which is no revision
        shutil.rmtree(folder)


def _refuse_in_use(model_id: str, use: ModelUse, *, force: bool) -> None:
    reasons = []
    if use.loaded:
        reasons.append(f"it is in memory ({_named(use.loaded)}); unload it first")
    if use.jobs:
        reasons.append(f"jobs that have not ended need it ({_named([job.id for job in use.jobs])}); cancel them first")
    if use.exports:
        reasons.append(f"exports that have not ended need it ({_named(use.exports)}); cancel them first")
    if use.adapters and not force:
        names = _named([record.id for record in use.adapters])
        reasons.append(f"adapters have it as their base ({names}); with `force` it is deleted all the same")
    if reasons:
        raise ModelInUse(
            f"{model_id} is needed: {'; '.join(reasons)}.",
            loaded_models=use.loaded,
            jobs=[job.id for job in use.jobs],
            exports=use.exports,
            adapters=[record.id for record in use.adapters],
        )


def _named(ids: list[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")


@singleton
def get_model_removal_service() -> ModelRemovalService:
    """Return the process's removal of models."""
    settings = get_settings()
    prepared_dir = settings.resolved_cache_dir / "models"
    return ModelRemovalService(get_database(), get_peft_service(), settings.model_dirs, prepared_dir)
