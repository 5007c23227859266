"""Requests and responses of /api/adapters."""

from typing import Any, Self

from pydantic import Field, model_validator

from api.peft_schemas import ModelId, Request, Response, Revision
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.vllm import VllmServing
from services.adapters.intake import ImportSettings
from store.records import AdapterRecord


class ImportFields(Request):
    """What a client may say about an adapter that it imports."""

    name: str | None = Field(default=None, min_length=1, max_length=200)
    base_model_id: ModelId | None = Field(
        default=None, description="The base, where the adapter's own config names none or a folder of another machine."
    )
    base_revision: Revision | None = None

    def settings(self) -> ImportSettings:
        """Return it as the service's type."""
        return ImportSettings(self.name, self.base_model_id, self.base_revision)


class ImportRequest(ImportFields):
    """An adapter on this machine, or on the Hub."""

    path: str | None = Field(
        default=None, min_length=1, max_length=4096, description="A folder below the data directory or a model folder."
    )
    hub_id: ModelId | None = Field(default=None, description="A repository of the Hub.")
    revision: Revision | None = Field(default=None, description="Of the repository.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("name one of path and hub_id, or upload a zip as `file`")
        if self.revision is not None and self.hub_id is None:
            raise ValueError("a revision is of a hub_id; the base's is base_revision")
        return self


class AdapterSummary(Response):
    id: str
    name: str
    version: int = Field(description="Counts the adapters of the same name, from 1.")
    base_model_id: str
    base_revision: str | None
    algorithm: Algorithm
    source: dict[str, Any] = Field(
        description="Where it is from; `kind` is training, checkpoint, folder, hub or upload."
    )
    warnings: list[str] = Field(description="What was left out of its config when it was brought in, and why.")
    job_id: str | None = Field(description="The job that trained it here.")
    dataset_sha256: str | None
    created_at: str


class AdapterFile(Response):
    name: str
    size_bytes: int


class VllmView(Response):
    """Exactly one of the two is there."""

    command: str | None = Field(
        description="Serves the folder as it is, for the same name as under /v1, on this machine or one that has both."
    )
    why_not: str | None = Field(description="Why vLLM cannot serve it as it is, and what to do.")


class AdapterDetails(AdapterSummary):
    config: PeftConfig | None = Field(description="The complete configuration it was trained with, where it is known.")
    metrics: dict[str, Any]
    path: str = Field(description="Its folder on the server's machine, as PEFT loads it.")
    files: list[AdapterFile]
    card: dict[str, Any] | None = Field(
        description="training.json: base and commit, dataset, outcome, packages and machine. `losses` are in the file."
    )
    vllm: VllmView = Field(description="How to serve it where vLLM is installed, on a machine with a GPU.")


class AdapterList(Response):
    adapters: list[AdapterSummary]


def summary_view(record: AdapterRecord) -> AdapterSummary:
    """Show an adapter in a list."""
    return AdapterSummary.model_validate(_shown(record))


def _shown(record: AdapterRecord) -> dict[str, Any]:
    source = {name: value for name, value in record.source.items() if name != "warnings"}
    return record.__dict__ | {"source": source, "warnings": record.source.get("warnings", [])}


def details_view(
    record: AdapterRecord, files: list[tuple[str, int]], card: dict[str, Any] | None, vllm: VllmServing
) -> AdapterDetails:
    """Show an adapter."""
    listed = [{"name": name, "size_bytes": size} for name, size in files]
    return AdapterDetails.model_validate(_shown(record) | {"files": listed, "card": card, "vllm": vars(vllm)})
