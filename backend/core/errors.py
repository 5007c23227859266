"""The errors of the service, named for the fact they state.

    StudioError
    ├── NotFound            ModelNotFound, TaskNotFound, LoadedModelNotFound, DatasetNotFound,
    │                       ImportNotFound, JobNotFound, CheckpointNotFound, AdapterNotFound, ExportNotFound
    ├── Rejected            SettingRejected, DatasetRejected, DatasetNotTrainable, ModelRejected,
    │                       CheckpointUnusable, AdapterRejected, ExportRejected
    ├── TooLarge            more bytes than the service takes
    ├── Conflict            DoesNotFit, ModelBusy, ModelNotReady, TransitionNotPermitted,
    │                       DatasetInUse, AdapterInUse, AdapterDamaged, NeedsRemoteCode,
    │                       NoSafeWeights
    ├── AccessDenied        ModelGated, DatasetGated, PathNotAllowed
    ├── Unavailable         HubUnavailable, EngineUnavailable, DatabaseUnavailable
    ├── EngineFailed        the engine process died or reported an error
    └── StorageFull         no space left where the data lives

To add one: subclass the branch whose HTTP meaning it has and give it a `slug` (stable, part of the API)
and a `title`. `api/problems.py` maps branches to statuses; a test proves that the map is complete.
"""

from typing import Any, ClassVar


class StudioError(Exception):
    """Base of every error a service raises on purpose.

    Args:
        detail: One sentence for a person: what is wrong with this request and what to do about it.
        extras: Typed members added to the problem document (RFC 9457 section 3.2), JSON-serialisable.
    """

    slug: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, **extras: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extras = extras


class NotFound(StudioError):
    """What the request names does not exist."""

    slug, title = "not-found", "Not found"


class ModelNotFound(NotFound):
    """Neither the Hub nor this machine has a model of that id."""

    slug, title = "model-not-found", "Model not found"


class TaskNotFound(NotFound):
    """The Hub knows no such task."""

    slug, title = "task-not-found", "Task not found"


class LoadedModelNotFound(NotFound):
    """No loaded model has that id (it may have been unloaded)."""

    slug, title = "loaded-model-not-found", "Loaded model not found"


class DatasetNotFound(NotFound):
    """No dataset has that id."""

    slug, title = "dataset-not-found", "Dataset not found"


class ImportNotFound(NotFound):
    """No import of a dataset that is under way has that id."""

    slug, title = "import-not-found", "Import not found"


class JobNotFound(NotFound):
    """No training job has that id."""

    slug, title = "job-not-found", "Job not found"


class CheckpointNotFound(NotFound):
    """The job has no such checkpoint."""

    slug, title = "checkpoint-not-found", "Checkpoint not found"


class AdapterNotFound(NotFound):
    """No adapter has that id."""

    slug, title = "adapter-not-found", "Adapter not found"


class ExportNotFound(NotFound):
    """No export has that id."""

    slug, title = "export-not-found", "Export not found"


class Rejected(StudioError):
    """The request is understood and cannot be carried out as it stands."""

    slug, title = "rejected", "Rejected"


class SettingRejected(Rejected):
    """A setting is out of range, contradicts another, or cannot take effect here."""

    slug, title = "setting-rejected", "Setting rejected"


class DatasetRejected(Rejected):
    """The file cannot be read as training data; `errors` names the lines."""

    slug, title = "dataset-rejected", "Dataset rejected"

    def __init__(self, detail: str, **extras: Any) -> None:
        super().__init__(detail, **({"errors": []} | extras))


class DatasetNotTrainable(Rejected):
    """Nothing would be learned from the dataset, or not by a fine-tune of this kind."""

    slug, title = "dataset-not-trainable", "Dataset not trainable"


class ModelRejected(Rejected):
    """The model's files cannot be used: a broken config, an unsupported architecture."""

    slug, title = "model-rejected", "Model rejected"


class CheckpointUnusable(Rejected):
    """The checkpoint is damaged, or does not belong to a run like the one asked for."""

    slug, title = "checkpoint-unusable", "Checkpoint unusable"


class AdapterRejected(Rejected):
    """The files are not an adapter that this service can serve safely."""

    slug, title = "adapter-rejected", "Adapter rejected"


class ExportRejected(Rejected):
    """The adapter cannot be exported so: its base or its tokenizer has no place in that format."""

    slug, title = "export-rejected", "Export rejected"


class TooLarge(StudioError):
    """More bytes were sent, or are to be fetched, than the service takes."""

    slug, title = "too-large", "Too large"


class Conflict(StudioError):
    """The request is sound but the present state does not allow it."""

    slug, title = "conflict", "Conflict"


class DoesNotFit(Conflict):
    """The memory estimate exceeds what the device has free."""

    slug, title = "does-not-fit", "Does not fit"


class ModelBusy(Conflict):
    """The engine that holds the model is training or generating."""

    slug, title = "model-busy", "Model busy"


class ModelNotReady(Conflict):
    """The model is still loading, or its load failed."""

    slug, title = "model-not-ready", "Model not ready"


class TransitionNotPermitted(Conflict):
    """The job's state does not allow that change."""

    slug, title = "transition-not-permitted", "Transition not permitted"


class DatasetInUse(Conflict):
    """A job that has not ended uses the dataset."""

    slug, title = "dataset-in-use", "Dataset in use"


class AdapterInUse(Conflict):
    """An export that has not ended uses the adapter."""

    slug, title = "adapter-in-use", "Adapter in use"


class AdapterDamaged(Conflict):
    """The adapter's files are not as they were written."""

    slug, title = "adapter-damaged", "Adapter damaged"


class NeedsRemoteCode(Conflict):
    """The repository asks to run Python of its own; this service never does."""

    slug, title = "needs-remote-code", "Needs remote code"


class NoSafeWeights(Conflict):
    """The repository has no safetensors weights, only pickled ones."""

    slug, title = "no-safe-weights", "No safetensors weights"


class AccessDenied(StudioError):
    """The Hub knows who asks and refuses."""

    slug, title = "access-denied", "Access denied"


class ModelGated(AccessDenied):
    """The model's licence must be accepted on the Hub, or a token is missing."""

    slug, title = "model-gated", "Model gated"


class DatasetGated(AccessDenied):
    """The dataset's terms must be accepted on the Hub, or a token is missing."""

    slug, title = "dataset-gated", "Dataset gated"


class PathNotAllowed(AccessDenied):
    """A path, or a link, leads out of the folders that the operator allows."""

    slug, title = "path-not-allowed", "Path not allowed"


class Unavailable(StudioError):
    """Something outside this process does not answer; trying later may help."""

    slug, title = "unavailable", "Unavailable"


class HubUnavailable(Unavailable):
    """The Hub cannot be reached or asks for a pause (`retry_after_s`), and nothing is cached."""

    slug, title = "hub-unavailable", "Hub unavailable"


class EngineUnavailable(Unavailable):
    """No engine process could be started."""

    slug, title = "engine-unavailable", "Engine unavailable"


class DatabaseUnavailable(Unavailable):
    """The database does not answer, or another transaction holds it for too long."""

    slug, title = "database-unavailable", "Database unavailable"


class EngineFailed(StudioError):
    """The engine process died or reported an error while carrying out a command."""

    slug, title = "engine-failed", "Engine failed"


class StorageFull(StudioError):
    """No space is left on the device that holds the data directory."""

    slug, title = "storage-full", "Storage full"
