"""What is known of a model. Unknown is None, never zero."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSummary:
    """A model as search shows it."""

    model_id: str
    author: str | None
    downloads: int | None
    likes: int | None
    task: str | None
    library: str | None
    tags: tuple[str, ...]
    license: str | None
    gated: bool | str | None
    parameters: int | None
    size_bytes: int | None
    architecture: str | None
    created_at: str | None
    modified_at: str | None
    local: bool


@dataclass(frozen=True)
class ModelFile:
    """One file of a repository."""

    path: str
    size_bytes: int | None


@dataclass(frozen=True)
class ModelDetails:
    """A model with its files and its config.json."""

    summary: ModelSummary
    sha: str | None
    revision: str | None
    files: tuple[ModelFile, ...]
    parameters_by_dtype: Mapping[str, int] | None
    config: Mapping[str, Any] | None
    chat_template: bool | None
    base_model: str | None
    languages: tuple[str, ...]
    requires_remote_code: bool | None


@dataclass(frozen=True)
class SearchQuery:
    """What to look for. Filters are joined by "and"."""

    query: str | None
    task: str | None
    author: str | None
    library: str | None
    tags: tuple[str, ...]
    license: str | None
    gated: bool | None
    min_parameters: int | None
    max_parameters: int | None
    sort: str
    limit: int
    cursor: str | None


def summary_from_hub(payload: Mapping[str, Any]) -> ModelSummary:
    """Read a model from the Hub's JSON, in its short or its long form."""
    tags = tuple(tag for tag in payload.get("tags") or () if isinstance(tag, str))
    card = payload.get("cardData") or {}
    safetensors = payload.get("safetensors") or {}
    config = payload.get("config") or {}
    architectures = config.get("architectures") or [None]
    model_id = str(payload.get("id") or payload.get("modelId"))
    return ModelSummary(
        model_id=model_id,
        author=payload.get("author") or (model_id.split("/")[0] if "/" in model_id else None),
        downloads=payload.get("downloads"),
        likes=payload.get("likes"),
        task=payload.get("pipeline_tag"),
        library=payload.get("library_name"),
        tags=tags,
        license=_license(card, tags),
        gated=payload.get("gated"),
        parameters=safetensors.get("total"),
        size_bytes=_weights_size(payload.get("siblings")),
        architecture=architectures[0],
        created_at=payload.get("createdAt"),
        modified_at=payload.get("lastModified"),
        local=False,
    )


def details_from_hub(
    payload: Mapping[str, Any], config: Mapping[str, Any] | None, revision: str | None
) -> ModelDetails:
    """Read a model's details from the Hub's JSON and its config.json."""
    siblings = payload.get("siblings") or ()
    card = payload.get("cardData") or {}
    hub_config = payload.get("config") or {}
    tokenizer = hub_config.get("tokenizer_config")
    base = card.get("base_model")
    languages = card.get("language") or ()
    parameters = (payload.get("safetensors") or {}).get("parameters")
    files = tuple(ModelFile(str(item["rfilename"]), item.get("size")) for item in siblings if "rfilename" in item)
    template_file = any(file.path == "chat_template.jinja" for file in files)
    remote = None
    if config is not None or hub_config:
        remote = bool((config or {}).get("auto_map") or hub_config.get("auto_map"))
    return ModelDetails(
        summary=summary_from_hub(payload),
        sha=payload.get("sha"),
        revision=revision,
        files=files,
        parameters_by_dtype=dict(parameters) if parameters else None,
        config=config,
        chat_template=True if template_file else "chat_template" in tokenizer if tokenizer is not None else None,
        base_model=base[0] if isinstance(base, list) and base else base if isinstance(base, str) else None,
        languages=tuple([languages] if isinstance(languages, str) else languages),
        requires_remote_code=remote,
    )


def _license(card: Mapping[str, Any], tags: tuple[str, ...]) -> str | None:
    named = card.get("license")
    if isinstance(named, str):
        return named
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)


def _weights_size(siblings: Any) -> int | None:
    """Sum the safetensors files; None where their sizes were not told."""
    sizes = [item.get("size") for item in siblings or () if str(item.get("rfilename", "")).endswith(".safetensors")]
    return sum(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None
