"""The errors of the service. A name states the fact; the branch decides the HTTP status.

To add one:

1. Subclass the branch whose status it has. A subclass goes here if several modules raise it, else beside its module.
2. Give it a docstring that says when it occurs, a `slug` (a stable part of the API) and a `title`.
3. Add it to the tree below. An error that is defined elsewhere names its module there.

`api/problems.py` maps each branch to its status. Tests prove that the map and this tree are complete.

    StudioError  500                  the base; raised itself for a fault of the server
    ├── NotFound  404
    │   ├── ModelNotFound
    │   ├── TaskNotFound
    │   ├── LoadedModelNotFound
    │   ├── DatasetNotFound
    │   ├── ImportNotFound
    │   ├── JobNotFound
    │   ├── CheckpointNotFound
    │   ├── AdapterNotFound
    │   ├── ExportNotFound
    │   ├── FileNotFound              services.file_service
    │   ├── UploadNotFound            services.files.uploads
    │   └── ExportFileNotFound        services.export_service
    ├── Rejected  422
    │   ├── SettingRejected
    │   ├── DatasetRejected
    │   ├── DatasetNotTrainable
    │   ├── ModelRejected
    │   ├── CheckpointUnusable
    │   ├── AdapterNotContinuable
    │   ├── AdapterRejected
    │   ├── AdapterOfAnotherBase      services.generation_service
    │   ├── GenerationRejected        services.generation_service
    │   ├── ExportRejected
    │   ├── PushRejected              services.hub.uploads
    │   ├── QueryRejected             services.hub.errors
    │   ├── FileRejected              services.fine_tuning_service
    │   ├── PurposeNotHere            api.openai.files
    │   ├── MethodNotHere             api.openai.fine_tuning
    │   ├── OptionNotHere             api.answer_form
    │   ├── IntegrationNotHere        api.openai.fine_tuning
    │   ├── UploadIncomplete          services.files.uploads
    │   ├── UploadMalformed           api.upload_form
    │   └── UploadAbandoned           api.datasets
    ├── TooLarge  413
    ├── Conflict  409
    │   ├── DoesNotFit
    │   ├── ModelBusy
    │   ├── ModelNotReady
    │   ├── TransitionNotPermitted
    │   ├── IdempotencyKeyReused      services.training.ledger
    │   ├── DatasetInUse
    │   ├── ModelInUse                services.model_removal_service
    │   ├── ModelNotDeletable         services.served_model_service
    │   ├── FileInUse                 services.file_service
    │   ├── UploadEnded               services.files.uploads
    │   ├── ResultFileKept            services.fine_tuning_service
    │   ├── ImportCancelled           services.datasets.imports
    │   ├── AdapterInUse
    │   ├── AdapterDamaged
    │   ├── ExportStopped             services.exports.control
    │   ├── NeedsRemoteCode
    │   ├── NoSafeWeights
    │   └── DownloadCancelled         services.hub.download_flight
    ├── AccessDenied  403
    │   ├── ModelGated
    │   ├── DatasetGated
    │   └── PathNotAllowed
    ├── Unavailable  503
    │   ├── HubUnavailable
    │   ├── DownloadCorrupt           services.hub.file_transfer
    │   ├── EmbeddedModelUnavailable  services.models.embedded
    │   ├── EngineUnavailable
    │   ├── TooManyAnswers            services.generation_service
    │   ├── NoRoomToAnswer            services.generation_service
    │   └── DatabaseUnavailable
    ├── EngineFailed  502
    │   ├── EngineDied                services.engines.process
    │   ├── CommandFailed             services.engines.process
    │   └── ExportNotProven           services.exports.check
    └── StorageFull  507
"""

from typing import Any, ClassVar


class StudioError(Exception):
    """The base of every error that the service raises on purpose.

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
    """Something that the request names does not exist."""

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
    """No dataset import with that id is under way."""

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

    @classmethod
    def of(cls, location: tuple[str, ...], why: str) -> "SettingRejected":
        """Refuse one setting; its name, with those that it stands below, begins the sentence."""
        message = f"{'.'.join(location)}: {why}"
        return cls(message, errors=[{"location": list(location), "message": message}])


class DatasetRejected(Rejected):
    """The file cannot be read as training data. `errors` names the lines."""

    slug, title = "dataset-rejected", "Dataset rejected"

    def __init__(self, detail: str, **extras: Any) -> None:
        super().__init__(detail, **({"errors": []} | extras))


class DatasetNotTrainable(Rejected):
    """A fine-tune would learn nothing from the dataset, or this kind of fine-tune cannot learn from it."""

    slug, title = "dataset-not-trainable", "Dataset not trainable"


class ModelRejected(Rejected):
    """The model's files cannot be used: a broken config, an unsupported architecture."""

    slug, title = "model-rejected", "Model rejected"


class CheckpointUnusable(Rejected):
    """The checkpoint is damaged, or it comes from a run with another model, dataset or settings."""

    slug, title = "checkpoint-unusable", "Checkpoint unusable"


class AdapterNotContinuable(Rejected):
    """No run can begin with the adapter's weights."""

    slug, title = "adapter-not-continuable", "Adapter not continuable"


class AdapterRejected(Rejected):
    """The files are not an adapter that this service can serve safely."""

    slug, title = "adapter-rejected", "Adapter rejected"


class ExportRejected(Rejected):
    """The format of the export cannot hold the adapter's base or its tokenizer."""

    slug, title = "export-rejected", "Export rejected"


class TooLarge(StudioError):
    """The client sent, or asked to download, more bytes than the service accepts."""

    slug, title = "too-large", "Too large"


class Conflict(StudioError):
    """The request is valid, but the present state does not allow it."""

    slug, title = "conflict", "Conflict"


class DoesNotFit(Conflict):
    """The memory estimate exceeds what the device has free."""

    slug, title = "does-not-fit", "Does not fit"


class ModelBusy(Conflict):
    """The engine of the model is training or generating."""

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
    """An export or a training job that has not ended uses the adapter."""

    slug, title = "adapter-in-use", "Adapter in use"


class AdapterDamaged(Conflict):
    """The adapter's files have changed since they were written, or some are missing."""

    slug, title = "adapter-damaged", "Adapter damaged"


class NeedsRemoteCode(Conflict):
    """The repository needs its own Python code to load. This service never runs such code."""

    slug, title = "needs-remote-code", "Needs remote code"


class NoSafeWeights(Conflict):
    """The repository has no safetensors weights, only pickled ones."""

    slug, title = "no-safe-weights", "No safetensors weights"


class AccessDenied(StudioError):
    """The Hub, or the operator's configuration, does not give this client access."""

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
    """Something outside of the server process does not answer. The same request may succeed later."""

    slug, title = "unavailable", "Unavailable"


class HubUnavailable(Unavailable):
    """The Hub cannot be reached or asks for a pause (`retry_after_s`), and the cache has no answer."""

    slug, title = "hub-unavailable", "Hub unavailable"


class EngineUnavailable(Unavailable):
    """No engine process could be started."""

    slug, title = "engine-unavailable", "Engine unavailable"


class DatabaseUnavailable(Unavailable):
    """The database does not answer, or another transaction blocks it for too long."""

    slug, title = "database-unavailable", "Database unavailable"


class EngineFailed(StudioError):
    """The engine process died or reported an error while carrying out a command."""

    slug, title = "engine-failed", "Engine failed"


class StorageFull(StudioError):
    """No space is left on the device that holds the data directory."""

    slug, title = "storage-full", "Storage full"
