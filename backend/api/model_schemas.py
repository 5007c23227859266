"""Requests and responses of /api/models."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints

from api.peft_schemas import Request, Response
from domain.models.records import DetailsAnswer, Fit, ModelSummary, SearchPage, SearchQuery, SortKey, Source, Verdict
from domain.peft.algorithms import Algorithm, AlgorithmName
from services.models.local import LocalModel

_MAX_PARAMETERS = 10**15  # a thousand times the largest model there is
Words = Annotated[str, StringConstraints(max_length=200)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\s\x00-\x1f]+$")]


class SearchRequest(Request):
    query: Words | None = Field(default=None, description="Words that the model's id contains.")
    task: Tag | None = Field(default="text-generation", description="The Hub's pipeline tag; null is any.")
    author: Tag | None = Field(default=None, description="User or organisation.")
    library: Tag | None = Field(default=None, description="E.g. `transformers`.", examples=["transformers"])
    tags: list[Tag] = Field(default_factory=list, max_length=20, description="All of them.")
    license: Tag | None = Field(default=None, description="Its identifier on the Hub.", examples=["apache-2.0"])
    gated: bool | None = Field(default=None, description="Whether a licence must be accepted first; null is either.")
    min_parameters: int | None = Field(default=None, ge=0, le=_MAX_PARAMETERS)
    max_parameters: int | None = Field(default=None, ge=1, le=_MAX_PARAMETERS)
    sort: SortKey = Field(default="downloads", description="Descending.")
    limit: int = Field(default=20, ge=1, le=100, description="Models a page.")
    cursor: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = Field(
        default=None, description="`next_cursor` of the page before, with the same query."
    )
    algorithm: AlgorithmName | None = Field(default=None, description="What `fit` is judged for; LoRA if it is null.")
    only_fitting: bool = Field(default=False, description="Leave out what does not fit this machine.")

    def to_query(self) -> SearchQuery:
        """Return the query as the domain's type."""
        values = self.model_dump() | {"tags": tuple(self.tags), "query": self.query or None}
        return SearchQuery(**values | {"algorithm": self.algorithm.value if self.algorithm else None})


class FitResponse(Response):
    verdict: Verdict = Field(
        description="`unknown` where a load would be refused, or a list does not show that the weights are safetensors."
    )
    estimate_bytes: int | None = Field(description="Peak memory of a fine-tune.")


class _Summary(Response):
    model_id: str = Field(description="`owner/name`.")
    author: str | None
    downloads: int | None = Field(description="In the last 30 days.")
    likes: int | None
    task: str | None = Field(description="The Hub's pipeline tag.")
    library: str | None
    tags: list[str]
    license: str | None
    gated: bool | None = Field(description="Whether a licence must be accepted first.")
    parameters: int | None = Field(description="Elements of all tensors.")
    size_bytes: int | None = Field(description="Of the safetensors weights that a load reads.")
    architecture: str | None = Field(description="The class that the config names first.")
    created_at: datetime | None = Field(description="Of the repository on the Hub.")
    modified_at: datetime | None = Field(description="Of the last commit on the Hub.")
    local: bool = Field(description="Whether it is on this machine.")


class ModelSummaryResponse(_Summary):
    fit: FitResponse | None = Field(description="Whether a fine-tune fits this machine; null where it is not judged.")

    @classmethod
    def of(cls, summary: ModelSummary, fit: Fit | None, **more: Any) -> Self:
        """Make the response of a record, with the fields that a subclass adds."""
        return cls(**_fields(summary), fit=_fit(fit), **more)


class LocalModelResponse(ModelSummaryResponse):
    path: str | None = Field(description="Its folder; null where it still has to be prepared.")
    revision: str | None = Field(description="The Hub's commit, where it came from there.")


class LocalModelsResponse(Response):
    models: list[LocalModelResponse]

    @classmethod
    def of(cls, models: list[tuple[LocalModel, Fit | None]]) -> Self:
        """Make the response of records."""
        return cls(
            models=[
                LocalModelResponse.of(
                    model.summary, fit, path=str(model.path) if model.path else None, revision=model.revision
                )
                for model, fit in models
            ]
        )


class SearchResponse(Response):
    models: list[ModelSummaryResponse]
    next_cursor: str | None = Field(description="Asks for the next page; null on the last.")
    source: Source = Field(description="`hub`: asked just now; `cache`: asked before; `local`: the Hub is away.")
    fetched_at: datetime = Field(description="When the Hub last confirmed this.")
    stale: bool = Field(description="Older than it should be, because the Hub cannot be reached.")

    @classmethod
    def of(cls, page: SearchPage) -> Self:
        """Make the response of a record."""
        models = [ModelSummaryResponse.of(model.summary, model.fit) for model in page.models]
        return cls(
            models=models,
            next_cursor=page.next_cursor,
            source=page.source,
            fetched_at=page.fetched_at,
            stale=page.stale,
        )


class FileResponse(Response):
    path: str
    size_bytes: int | None


class SafetensorsResponse(Response):
    parameters_by_dtype: dict[str, int] = Field(description="safetensors dtype → elements.")


class ConfigResponse(Response):
    model_type: str | None
    hidden_size: int | None
    layers: int | None
    heads: int | None = Field(description="Attention heads of a layer.")
    kv_heads: int | None = Field(description="Heads that keys and values have.")
    intermediate_size: int | None
    vocab_size: int | None
    max_position_embeddings: int | None = Field(description="Tokens.")
    tied_embeddings: bool | None = Field(description="Whether the output head is the embedding.")
    experts: int | None = Field(description="Experts of a layer.")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read config.json under the names that the families use. A nested text model stands for the whole model."""
        inner = config.get("text_config")
        merged = {**config, **inner} if isinstance(inner, dict) else dict(config)

        def first(*names: str) -> int | None:
            values = (merged.get(name) for name in names)
            return next((value for value in values if type(value) is int and value > 0), None)

        model_type, tied = config.get("model_type"), merged.get("tie_word_embeddings")
        return cls(
            model_type=model_type if isinstance(model_type, str) else None,
            hidden_size=first("hidden_size", "n_embd", "d_model"),
            layers=first("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
            heads=first("num_attention_heads", "n_head", "n_heads", "num_heads"),
            kv_heads=first("num_key_value_heads", "multi_query_group_num"),
            intermediate_size=first("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
            vocab_size=first("vocab_size", "padded_vocab_size"),
            max_position_embeddings=first("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
            tied_embeddings=tied if isinstance(tied, bool) else None,
            experts=first("num_local_experts", "num_experts", "n_routed_experts"),
        )


class ModelDetailsResponse(_Summary):
    fit: dict[Algorithm, FitResponse | None] | None = Field(
        description="Algorithm → whether a fine-tune fits this machine; null where it is not judged."
    )
    sha: str | None = Field(description="The commit that this describes.")
    revision: str | None = Field(description="What was asked for.")
    files: list[FileResponse]
    safetensors: SafetensorsResponse | None
    config: ConfigResponse | None = Field(description="From config.json; null where there is none or access is gated.")
    chat_template: bool | None
    base_model: str | None = Field(description="What it was made from: the first that the model card names.")
    languages: list[str] | None = Field(description="That the model card names; null where there is no card.")
    requires_remote_code: bool | None = Field(description="Whether loading it would run the repository's own Python.")
    source: Source
    fetched_at: datetime = Field(description="When the Hub last confirmed this.")
    stale: bool = Field(description="Older than it should be, because the Hub cannot be reached.")

    @classmethod
    def of(cls, answer: DetailsAnswer) -> Self:
        """Make the response of a record."""
        details, counts = answer.details, answer.details.parameters_by_dtype
        judged = {Algorithm(name): _fit(fit) for name, fit in answer.fits.items()}
        return cls(
            **_fields(details.summary),
            fit=judged if any(fit is not None for fit in judged.values()) else None,
            sha=details.sha,
            revision=details.revision,
            files=[FileResponse(path=file.path, size_bytes=file.size_bytes) for file in details.files],
            safetensors=SafetensorsResponse(parameters_by_dtype=counts) if counts is not None else None,
            config=ConfigResponse.of(details.config) if details.config is not None else None,
            chat_template=details.chat_template,
            base_model=details.base_model,
            languages=list(details.languages) if details.languages is not None else None,
            requires_remote_code=details.requires_remote_code,
            source=answer.source,
            fetched_at=answer.fetched_at,
            stale=answer.stale,
        )


def _fields(summary: ModelSummary) -> dict[str, Any]:
    known = vars(summary) | {"tags": list(summary.tags)}
    del known["sha"]
    return known


def _fit(fit: Fit | None) -> FitResponse | None:
    return FitResponse(verdict=fit.verdict, estimate_bytes=fit.estimate_bytes) if fit is not None else None
