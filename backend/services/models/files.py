"""Turns a model id into a folder of safe weights on this machine. It downloads what is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from core.errors import ModelGated, NeedsRemoteCode, SettingRejected
from domain.hub.repos import model_repo
from domain.models.config_checks import check_asks_for_no_code, check_dimensions
from domain.models.load_files import pickled_weights
from domain.models.records import ModelDetails, weight_files
from services.hub.downloads import Downloads
from services.hub.snapshot_spec import SnapshotSpec
from services.models.blockers import disabled
from services.models.embedded import MODEL_ID, EmbeddedModel
from services.models.local import LocalModel
from services.models.pickled import PickledModels
from services.models.progress import LoadProgress, OnProgress
from services.models.safety import check_safe, check_snapshot, no_safe_weights
from services.models.snapshot_specs import MODEL, PICKLED_MODEL, TOKENIZER


class Registry(Protocol):
    """What is known of models, here and on the Hub."""

    def resolve_local(self, model_id: str, revision: str | None) -> LocalModel | None:
        """Return the model on this machine, at a commit if one is named, or None."""
        ...

    def details_of(self, model_id: str, revision: str | None) -> ModelDetails:
        """Return what its files are."""
        ...


class ModelFiles:
    """Makes sure that a model's files are here and safe to load.

    Args:
        embedded: The model that needs no Hub.
        registry: Finds models on this machine, and asks the Hub about others.
        downloads: Downloads what is missing.
        pickled: Converts pickled weights.
    """

    def __init__(
        self, embedded: EmbeddedModel, registry: Registry, downloads: Downloads, pickled: PickledModels
    ) -> None:
        self._embedded, self._registry, self._downloads, self._pickled = embedded, registry, downloads, pickled

    def check(self, model_id: str, revision: str | None, *, allow_pickle: bool = False) -> None:
        """Refuse at once what `ensure` would refuse later; nothing is downloaded.

        Raises:
            ModelNotFound, AccessDenied, HubUnavailable: As the Hub says.
            NeedsRemoteCode, NoSafeWeights, ModelRejected: As `ensure` says.
            SettingRejected: Pickled weights are asked for at a revision.
        """
        if allow_pickle and revision is not None:
            raise SettingRejected("allow_pickle: weights are converted at `main` only; leave the revision out.")
        if model_id == MODEL_ID and revision is None:
            return
        local = self._registry.resolve_local(model_id, revision)
        if local is not None and local.path is not None:
            names = [file.name for file in local.path.iterdir()]
            if allow_pickle and not weight_files(names) and pickled_weights(names):
                return check_snapshot(local.path, model_id)  # downloaded, and not converted yet
            return check_safe(local.path, model_id)
        details = self._registry.details_of(model_id, revision)
        if details.disabled:
            raise disabled(model_id)
        paths = [file.path for file in details.files]
        if details.requires_remote_code:
            raise NeedsRemoteCode(f"{model_id} asks to run its own Python (auto_map); it is never run here.")
        if not weight_files(paths) and not (allow_pickle and pickled_weights(paths)):
            raise no_safe_weights(model_id, paths)
        if details.config is not None:
            check_asks_for_no_code(model_id, "config.json", details.config)
            check_dimensions(model_id, details.config)
        elif details.summary.gated:
            raise ModelGated(
                f"{model_id} is gated: accept its licence on its page, and set HF_TOKEN or send X-HF-Token."
            )

    def ensure(
        self,
        model_id: str,
        revision: str | None,
        on_progress: OnProgress,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        allow_pickle: bool = False,
    ) -> Path:
        """Return the folder. Files in the Hub's cache are checked by their digests; damaged ones are replaced.

        Args:
            model_id: Which model.
            revision: Branch, tag or commit. None is the copy on this machine, or else `main`.
            on_progress: Takes the state of the load and its progress.
            cancelled: Called now and then. A download stops when its last waiting caller has left.
            allow_pickle: Whether pickled weights are accepted if there are no safetensors. They are converted once.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
            NeedsRemoteCode: A config asks to run code from elsewhere.
            NoSafeWeights: There are no safetensors.
            StorageFull, DownloadCorrupt, DownloadCancelled: As `Downloads.fetch` says.
        """
        spec = PICKLED_MODEL if allow_pickle else MODEL
        path = self._locate(model_id, revision, on_progress, cancelled, spec)
        if allow_pickle and not weight_files(file.name for file in path.iterdir()):
            path = self._pickled.convert(
                model_id, path, lambda fraction: on_progress("loading", LoadProgress(fraction)), cancelled
            )
        check_safe(path, model_id)
        return path

    def ensure_tokenizer(self, model_id: str, revision: str | None) -> Path:
        """Return a folder with the model's tokenizer and configs; weights need not be in it.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
            NeedsRemoteCode, ModelRejected: A config asks to run code from elsewhere, or there is none.
        """
        path = self._locate(model_id, revision, lambda *_: None, lambda: False, TOKENIZER)
        check_snapshot(path, model_id)
        return path

    def _locate(
        self,
        model_id: str,
        revision: str | None,
        on_progress: OnProgress,
        cancelled: Callable[[], bool],
        spec: SnapshotSpec,
    ) -> Path:
        if model_id == MODEL_ID and revision is None:
            return self._embedded.prepare(lambda _stage, fraction: on_progress("loading", LoadProgress(fraction)))
        local = self._registry.resolve_local(model_id, revision)
        if local is not None and local.path is not None:
            if not self._downloads.cache.holds(local.path) or not self._downloads.cache.damaged(local.path):
                return local.path
            revision = local.revision  # downloads what is damaged of the same commit
        on_progress("downloading", LoadProgress())
        return self._downloads.fetch(
            model_repo(model_id),
            revision,
            lambda progress: on_progress("downloading", LoadProgress.of_download(progress)),
            cancelled,
            spec=spec,
        )
