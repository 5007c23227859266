"""Records of what is known of a model. What is not known is None, never 0 and never a guess.

The second half reads the Hub's JSON (https://huggingface.co/docs/hub/api) into these records. It refuses only an answer
that names no model: an odd field must not hide the other fields.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from domain.hub.repos import MODELS, model_repo
from domain.hub.wire import count, mapping, moment, text, texts

Verdict = Literal["fits", "tight", "does_not_fit", "unknown"]
SortKey = Literal["downloads", "likes", "trending", "created", "modified"]
Source = Literal["hub", "cache", "local"]

# The pipeline tags that the Hub offers for models. Source: huggingface/huggingface.js,
# packages/tasks/src/pipelines.ts, PIPELINE_DATA without those marked hideInModels.
TASKS = (
    *("any-to-any", "audio-classification", "audio-text-to-text", "audio-to-audio", "automatic-speech-recognition"),
    *("biology", "depth-estimation", "document-question-answering", "feature-extraction", "fill-mask", "graph-ml"),
    *("image-classification", "image-feature-extraction", "image-segmentation", "image-text-to-text", "image-to-3d"),
    *("image-to-image", "image-to-text", "image-to-video", "keypoint-detection", "mask-generation"),
    *("object-detection", "question-answering", "reinforcement-learning", "robotics", "sentence-similarity"),
    *("summarization", "table-question-answering", "tabular-classification", "tabular-regression"),
    *("text-classification", "text-generation", "text-ranking", "text-to-3d", "text-to-audio", "text-to-image"),
    *("text-to-speech", "text-to-video", "text2text-generation", "time-series-forecasting", "token-classification"),
    *("translation", "unconditional-image-generation", "video-classification", "video-text-to-text"),
    *("visual-document-retrieval", "visual-question-answering", "voice-activity-detection"),
    *("zero-shot-classification", "zero-shot-image-classification", "zero-shot-object-detection"),
)

_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
# The Hub began to store creation dates at this time. Older repositories have it as their date.
# Source: huggingface_hub/hf_api.py, ModelInfo.created_at.
_CREATED_BEFORE_DATES = "2022-03-02T23:29:04.000Z"


@dataclass(frozen=True)
class Fit:
    """Whether fine-tuning a model fits this machine, and the bytes it was estimated to need."""

    verdict: Verdict
    estimate_bytes: int | None


@dataclass(frozen=True)
class ModelSummary:
    """A model in a list.

    Attributes:
        downloads: In the last 30 days.
        parameters: Elements of all tensors.
        size_bytes: Bytes of the safetensors weights that a load would read.
        architecture: The class that the config names first, e.g. `LlamaForCausalLM`.
        created_at, modified_at: Of the repository, aware.
        sha: The commit that it describes.
        local: Whether the model is on this machine.
    """

    model_id: str
    author: str | None = None
    downloads: int | None = None
    likes: int | None = None
    task: str | None = None
    library: str | None = None
    tags: tuple[str, ...] = ()
    license: str | None = None
    gated: bool | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    architecture: str | None = None
    created_at: datetime | None = None
    modified_at: datetime | None = None
    sha: str | None = None
    local: bool = False


@dataclass(frozen=True)
class ModelFile:
    """A file of a repository: its path there and its bytes."""

    path: str
    size_bytes: int | None


@dataclass(frozen=True)
class ModelDetails:
    """A model by itself.

    Attributes:
        sha: The commit that this describes.
        revision: The branch, tag or commit that was asked for.
        parameters_by_dtype: safetensors dtype → elements.
        config: config.json as it is.
        base_model: The first that the model card names.
        languages: None where there is no model card to name any.
        requires_remote_code: Whether loading it would run the repository's own Python.
        disabled: Whether the Hub has closed the repository to everybody.
    """

    summary: ModelSummary
    sha: str | None
    revision: str | None
    files: tuple[ModelFile, ...]
    parameters_by_dtype: dict[str, int] | None
    config: dict[str, Any] | None
    chat_template: bool | None
    base_model: str | None
    languages: tuple[str, ...] | None
    requires_remote_code: bool | None
    disabled: bool | None = None


@dataclass(frozen=True)
class SearchQuery:
    """What to look for. `algorithm` and `only_fitting` concern this machine, not the Hub."""

    query: str | None = None
    task: str | None = "text-generation"
    author: str | None = None
    library: str | None = None
    tags: tuple[str, ...] = ()
    license: str | None = None
    gated: bool | None = None
    min_parameters: int | None = None
    max_parameters: int | None = None
    sort: SortKey = "downloads"
    limit: int = 20
    cursor: str | None = None
    algorithm: str | None = None
    only_fitting: bool = False


@dataclass(frozen=True)
class HubPage:
    """One page of the Hub's list; `next_cursor` asks for the one after it."""

    models: tuple[ModelSummary, ...]
    next_cursor: str | None


@dataclass(frozen=True)
class RatedModel:
    """A model with its fit; None where it was not judged."""

    summary: ModelSummary
    fit: Fit | None


@dataclass(frozen=True)
class SearchPage:
    """The answer to a search. `stale` says that it is past its time to live: the Hub could not be reached."""

    models: tuple[RatedModel, ...]
    next_cursor: str | None
    source: Source
    fetched_at: datetime
    stale: bool


@dataclass(frozen=True)
class DetailsAnswer:
    """The answer to a question about one model; `fits` is algorithm → fit."""

    details: ModelDetails
    fits: dict[str, Fit | None]
    source: Source
    fetched_at: datetime
    stale: bool


def check_model_id(model_id: str) -> None:
    """Refuse what cannot be a model id of the Hub.

    Raises:
        ModelRejected: As `Repo.check` says.
    """
    model_repo(model_id).check()


def check_revision(revision: str) -> None:
    """Refuse what cannot be a model's branch, tag or commit.

    Raises:
        ModelRejected: As `RepoKind.check_revision` says.
    """
    MODELS.check_revision(revision)


def in_bounds(summary: ModelSummary, query: SearchQuery) -> bool:
    """Tell whether a model's parameters are within a query's bounds. An unknown number is within no bound."""
    if query.min_parameters is None and query.max_parameters is None:
        return True
    known = summary.parameters
    if known is None or known < (query.min_parameters or 0):
        return False
    return query.max_parameters is None or known <= query.max_parameters


def weight_files(paths: Iterable[str]) -> tuple[str, ...]:
    """Choose the safetensors files that a load would read; none if a shard is missing.

    The order is that of transformers: `model.safetensors`, then numbered shards, then other files at the top.
    """
    top = sorted(path for path in paths if path.endswith(".safetensors") and "/" not in path)
    if "model.safetensors" in top:
        return ("model.safetensors",)
    shards = {path: int(match[1]) for path in top if (match := _SHARD.fullmatch(path))}
    if shards:
        return tuple(shards) if set(shards.values()) == {len(shards)} else ()
    return tuple(path for path in top if not path.startswith("adapter_"))


def summary_from_wire(payload: Mapping[str, Any]) -> ModelSummary:
    """Read one model of the Hub's list, or the Hub's answer about one model.

    Raises:
        ValueError: It names no model.
    """
    model_id = text(payload.get("id")) or text(payload.get("modelId"))
    if model_id is None:
        raise ValueError("the Hub described a model without an id")
    tags = texts(payload.get("tags"))
    licenses = [tag.removeprefix("license:") for tag in tags if tag.startswith("license:")]
    card = mapping(payload.get("cardData"))
    gated = payload.get("gated")
    created = payload.get("createdAt")
    counted = parameters_from_wire(payload)
    architectures = texts(mapping(payload.get("config")).get("architectures"))
    return ModelSummary(
        model_id=model_id,
        # The owner is part of the id; the short form of the list says it nowhere else.
        author=text(payload.get("author")) or (model_id.split("/")[0] if "/" in model_id else None),
        downloads=count(payload.get("downloads")),
        likes=count(payload.get("likes")),
        task=text(payload.get("pipeline_tag")),
        library=text(payload.get("library_name")),
        tags=tags,
        license=licenses[0] if licenses else text(card.get("license")),
        gated=gated if isinstance(gated, bool) else True if gated in ("auto", "manual") else None,
        parameters=count(mapping(payload.get("safetensors")).get("total")) or sum((counted or {}).values()) or None,
        size_bytes=weights_bytes(files_from_wire(payload)),
        architecture=architectures[0] if architectures else None,
        created_at=None if created == _CREATED_BEFORE_DATES else moment(created),
        modified_at=moment(payload.get("lastModified")),
        sha=text(payload.get("sha")),
    )


def details_from_wire(
    payload: Mapping[str, Any],
    revision: str | None,
    config: dict[str, Any] | None,
    tokenizer_config: dict[str, Any] | None,
) -> ModelDetails:
    """Read the Hub's answer about one model, with two of its files where they could be had.

    Raises:
        ValueError: It names no model.
    """
    summary = summary_from_wire(payload)
    files = files_from_wire(payload)
    card = payload.get("cardData")
    short = mapping(payload.get("config"))  # the Hub's excerpt of config.json and tokenizer_config.json
    templates = (short.get("chat_template_jinja"), mapping(short.get("tokenizer_config")).get("chat_template"))
    bases = texts(mapping(card).get("base_model"))
    disabled = payload.get("disabled")
    return ModelDetails(
        summary=summary,
        sha=text(payload.get("sha")),
        revision=revision,
        files=files,
        parameters_by_dtype=parameters_from_wire(payload),
        config=config,
        chat_template=any(templates) or has_chat_template([file.path for file in files], tokenizer_config),
        base_model=bases[0] if bases else None,
        languages=texts(card.get("language")) if isinstance(card, Mapping) else None,
        requires_remote_code="custom_code" in summary.tags or needs_remote_code(config, tokenizer_config),
        disabled=disabled if isinstance(disabled, bool) else None,
    )


def has_chat_template(paths: Iterable[str], tokenizer_config: Mapping[str, Any] | None) -> bool | None:
    """Tell whether a repository carries a chat template; None if its tokenizer_config.json could not be read."""
    paths = set(paths)
    if paths & {"chat_template.jinja", "chat_template.json"}:
        return True
    if tokenizer_config is not None:
        return bool(tokenizer_config.get("chat_template"))
    return False if paths and "tokenizer_config.json" not in paths else None


def needs_remote_code(*configs: Mapping[str, Any] | None) -> bool | None:
    """Tell whether a config maps classes to the repository's own Python; None if none could be read."""
    known = [config for config in configs if config is not None]
    return any(bool(config.get("auto_map")) for config in known) if known else None


def files_from_wire(payload: Mapping[str, Any]) -> tuple[ModelFile, ...]:
    """Read `siblings`; sizes are there only if blobs were asked for."""
    siblings = payload.get("siblings")
    entries = [mapping(item) for item in siblings] if isinstance(siblings, list) else []
    return tuple(
        ModelFile(path, count(entry.get("size"))) for entry in entries if (path := text(entry.get("rfilename")))
    )


def parameters_from_wire(payload: Mapping[str, Any]) -> dict[str, int] | None:
    """Read what the Hub counted in the safetensors headers."""
    counted = mapping(mapping(payload.get("safetensors")).get("parameters"))
    return {dtype: number for dtype, value in counted.items() if (number := count(value)) is not None} or None


def weights_bytes(files: Iterable[ModelFile]) -> int | None:
    """Sum the sizes of the weights, or None if one is not known or there are none."""
    sizes = {file.path: file.size_bytes for file in files}
    weights = weight_files(sizes)
    known = [size for path in weights if (size := sizes[path]) is not None]
    return sum(known) if known and len(known) == len(weights) else None
