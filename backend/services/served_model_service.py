"""The models of OpenAI's API: bases of this machine and fine-tuned ones, found by name and loaded when asked for."""

import json
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass
from pathlib import Path

from core.clock import SystemClock
from core.errors import (
    AdapterNotFound,
    Conflict,
    JobNotFound,
    ModelNotFound,
    ModelNotReady,
    StudioError,
)
from core.settings import get_settings
from core.singleton import singleton
from domain.adapter_files import CONFIG
from domain.openai.fine_tunes import as_seconds, name_of
from domain.openai.names import (
    ORGANIZATION_ID,
    FineTunedName,
    id_in_name,
    is_fine_tuned,
    read_fine_tuned,
    stands_for,
    suffix_in_name,
)
from domain.peft.algorithms import Algorithm
from domain.vllm import VllmBase, VllmServing, serve_with_vllm
from services.adapter_service import AdapterService, get_adapter_service
from services.dataset_service import get_dataset_service
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from services.peft_service import LoadedModel, LoadRequest, PeftService, get_peft_service
from services.training.checkpoint_adapters import CheckpointAdapters, checkpoint_adapter_id
from services.training.fine_tune_facts import facts_of
from services.training.ledger import JobLedger
from services.training_service import get_training_service
from store.records import AdapterRecord

_LOAD_S = 540.0  # the SDK waits ten minutes for an answer
_CHECKPOINT = "checkpoint"
_TEMPLATE = "chat_template.jinja"


class ModelNotDeletable(Conflict):
    """Only fine-tuned models can be deleted; bases are files of this machine."""

    slug, title = "model-not-deletable", "Model not deletable"


@dataclass(frozen=True)
class ServedModel:
    """A model by its name.

    Attributes:
        created: Unix seconds; 0 where that is not known.
        base_id: The base that it runs on.
        adapter_id: Of a fine-tuned model; None for a base, and for a checkpoint that is no adapter yet.
        job_id: Of a checkpoint, the job; None for any other.
        step: Of a checkpoint.
    """

    name: str
    created: int
    owned_by: str
    base_id: str
    revision: str | None = None
    adapter_id: str | None = None
    algorithm: str | None = None
    job_id: str | None = None
    step: int | None = None


class ServedModelService:
    """Finds models by name, and has them ready to answer.

    Args:
        names: The names that stand for local bases.
    """

    def __init__(
        self,
        registry: ModelRegistryService,
        peft: PeftService,
        adapters: AdapterService,
        ledger: JobLedger,
        checkpoints: CheckpointAdapters,
        names: tuple[tuple[str, str], ...],
    ) -> None:
        self._registry, self._peft, self._adapters = registry, peft, adapters
        self._ledger, self._checkpoints, self._names = ledger, checkpoints, names

    # Names

    def all(self) -> list[ServedModel]:
        """Return every model: the bases here, the names that stand for one, and the fine-tuned ones."""
        bases = [self._base(model.model_id, model.model_id) for model in self._registry.local_models()]
        there = {model.base_id for model in bases}
        named = [self._base(name, base) for name, base in self._names if "*" not in name and base in there]
        return [*bases, *named, *(self._fine_tuned(record) for record in self._adapters.all())]

    def find(self, name: str) -> ServedModel:
        """Return a model by its name.

        Raises:
            ModelNotFound: There is none; the message says what there is.
        """
        if is_fine_tuned(name):
            return self._find_fine_tuned(name)
        base = stands_for(name, self._names) or name
        if self._registry.resolve_local(base) is None:
            loaded = next((model for model in self._peft.models() if model.model_id == base), None)
            if loaded is None:
                raise ModelNotFound(
                    f"{name} is no model of this machine: GET /v1/models lists them. To give one another name, start "
                    f"the server with PEFT_STUDIO_MODEL_NAMES={name}=<model>; to fetch one from the Hub, "
                    "POST /api/peft/load-model."
                )
        return self._base(name, base)

    def _base(self, name: str, base_id: str) -> ServedModel:
        local = self._registry.resolve_local(base_id)
        created = int(local.path.stat().st_mtime) if local is not None and local.path is not None else 0
        owner = base_id.partition("/")[0] if "/" in base_id else "local"
        return ServedModel(name, created, owner, base_id)

    def _find_fine_tuned(self, name: str) -> ServedModel:
        read = read_fine_tuned(name)
        if read is not None:
            found = self._of_job(read) if read.step is not None else self._of_adapter(read)
            if found is not None and found.name == name:
                return found
        raise ModelNotFound(f"No fine-tuned model has the name {name}; GET /v1/models lists them.")

    def _of_adapter(self, read: FineTunedName) -> ServedModel | None:
        try:
            return self._fine_tuned(self._adapters.get(f"adp_{read.id}"))
        except AdapterNotFound:
            return None

    def _of_job(self, read: FineTunedName) -> ServedModel | None:
        """Return a checkpoint: one that is an adapter already, or one that its job still has."""
        job_id, step = f"job_{read.id}", read.step or 0
        try:
            return self._fine_tuned(self._adapters.get(checkpoint_adapter_id(job_id, step)))
        except AdapterNotFound:
            pass
        try:
            job = self._ledger.get(job_id)
        except JobNotFound:
            return None
        if not self._checkpoints.has(job_id, step):
            return None
        name = str(name_of(facts_of(job)).at(step))
        created = as_seconds(job.created_at)
        base, revision = job.model_id, job.revision
        return ServedModel(name, created, ORGANIZATION_ID, base, revision, None, job.algorithm, job_id, step)

    def _fine_tuned(self, record: AdapterRecord) -> ServedModel:
        name = FineTunedName(record.base_model_id, suffix_in_name(record.name), id_in_name(record.id))
        step = record.source.get("step") if record.source["kind"] == _CHECKPOINT else None
        if record.job_id is not None:
            try:
                name = name_of(facts_of(self._ledger.get(record.job_id))).at(step)
            except JobNotFound:  # deleted; its adapter stays, under its own name
                step = None
        return ServedModel(
            str(name),
            as_seconds(record.created_at),
            ORGANIZATION_ID,
            record.base_model_id,
            record.base_revision,
            record.id,
            record.algorithm,
        )

    def delete(self, name: str) -> None:
        """Delete a fine-tuned model: its adapter, also under /api.

        Raises:
            ModelNotFound: There is none of that name.
            ModelNotDeletable: It is a base, or a checkpoint that only its job has.
            AdapterInUse, ModelBusy: It is used.
        """
        model = self.find(name)
        if model.job_id is not None:
            raise ModelNotDeletable(f"{name} goes with its job: DELETE /api/training/jobs/{model.job_id}.")
        if model.adapter_id is None:
            raise ModelNotDeletable(f"{name} is a base model; only fine-tuned models can be deleted.")
        self._adapters.delete(model.adapter_id)

    def vllm(self, record: AdapterRecord) -> VllmServing:
        """Return how vLLM serves an adapter under the name that it has here."""
        folder = Path(record.path)
        try:
            config = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError):
            config = None
        template = folder / _TEMPLATE
        return serve_with_vllm(
            self._base_for_vllm(record),
            self._fine_tuned(record).name,
            str(folder),
            config if isinstance(config, dict) else None,
            str(template) if template.is_file() else None,
        )

    def _base_for_vllm(self, record: AdapterRecord) -> VllmBase:
        local = self._registry.resolve_local(record.base_model_id, record.base_revision)
        if local is not None and local.revision is None and local.path is not None:
            return VllmBase(str(local.path), None)  # it did not come from the Hub
        return VllmBase(record.base_model_id, record.base_revision)

    def adapter_of(self, model: ServedModel) -> str | None:
        """Return the adapter of a fine-tuned model, which is made if the model is a checkpoint; None for a base.

        Raises:
            CheckpointNotFound, CheckpointUnusable: Its job has no such checkpoint, or it is damaged.
            ModelBusy: The base did not come free in time to write the adapter.
            StudioError: As loading the base says, or the engine.
        """
        if model.job_id is None or model.step is None:
            return model.adapter_id
        return self._checkpoints.adapter_of(self._ledger.get(model.job_id), model.step).id

    # Answering

    def ready(self, model: ServedModel) -> tuple[LoadedModel, str | None]:
        """Have a model in memory; wait for it if need be.

        Returns:
            The loaded base, and the adapter to answer with.

        Raises:
            DoesNotFit: There is no room for the base, with every idle one unloaded.
            ModelNotReady: It takes too long to load; it goes on loading.
            ModelBusy: A job holds the base.
            StudioError: As the load says, or the engine.
        """
        adapter_id = self.adapter_of(model)
        loaded = self._in_memory(model) or self._peft.load(
            LoadRequest(
                model_id=model.base_id,
                revision=model.revision,
                algorithm=Algorithm(model.algorithm) if model.algorithm is not None else Algorithm.LORA,
                use_case=None,
                overrides={},
                engine="auto",
                device="auto",
                force=False,
            )
        )
        loading = loaded.base.loading
        if loading is not None:
            try:
                loading.exception(_LOAD_S)
            except NotDone:
                raise ModelNotReady(f"{model.base_id} is still {loaded.state.value}; try again later.") from None
        if loaded.base.error is not None and not loaded.base.usable:
            error: StudioError = loaded.base.error
            raise error
        return loaded, adapter_id

    def _in_memory(self, model: ServedModel) -> LoadedModel | None:
        """Return a base in memory that can answer, in whatever precision it is; the newest counts."""
        for loaded in reversed(self._peft.models()):
            if (loaded.model_id, loaded.revision) == (model.base_id, model.revision) and (
                loaded.base.usable or loaded.base.under_way
            ):
                return loaded
        return None


@singleton
def get_served_model_service() -> ServedModelService:
    """Return the process's service of models by name."""
    training, peft, adapters = get_training_service(), get_peft_service(), get_adapter_service()
    checkpoints = CheckpointAdapters(peft, get_dataset_service(), adapters, training.checkpoints, SystemClock())
    return ServedModelService(
        get_model_registry_service(),
        peft,
        adapters,
        training.ledger,
        checkpoints,
        get_settings().model_names,
    )
