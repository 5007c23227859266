"""What exports are asked for and what they make, by kind: the engine or the upload says it, the record keeps it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from domain.jobs.export_states import ExportKind, ExportState
from domain.jobs.stored import Stored
from domain.models.gguf import GgufType


class MergedSettings(Stored):
    """A merged model has the type of the base's own files: there is nothing to set."""


class GgufSettings(Stored):
    """How the tensors of a GGUF file are stored."""

    quantization: GgufType


class PushSettings(Stored):
    """Where an adapter is pushed.

    Attributes:
        repo_id: `owner/name` on the Hub.
        token: Whose it is: it came with the request, or the server has it. The token itself is not stored.
    """

    repo_id: str
    private: bool
    token: Literal["request", "server"]


class ExportCheck(Stored):
    """How an export was compared with base and adapter before it was called succeeded.

    Attributes:
        tensors: Compared one by one.
        prompts: Answered by both.
        tokens: Of the prompts.
        difference: Of the answers' logits: the norm of the difference by their norm, at the median token. None where no
            answers were compared; the notes say why.
        tolerance: What the rounding of its type may make of it.
        elapsed_s: How long the check took.
        notes: What could not be compared.
    """

    tensors: int
    prompts: int
    tokens: int
    difference: float | None
    tolerance: float
    elapsed_s: float
    notes: list[str]


class MergedModel(Stored):
    """A normal model with the adapter in its weights.

    Attributes:
        size_bytes: Of the weights.
        dtype: Their type.
        notes: How they were computed.
        check: How it was checked; None in records of exports that were not.
    """

    size_bytes: int
    dtype: str
    adapted_layers: int
    notes: list[str]
    check: ExportCheck | None = None


class GgufFile(Stored):
    """The same as one file for llama.cpp.

    Attributes:
        size_bytes: Of the tensors.
        tensors: How many there are of each type.
        pre_tokenizer: By llama.cpp's name.
        check: How it was checked; None in records of exports that were not.
    """

    filename: str
    size_bytes: int
    tensors: dict[str, int]
    pre_tokenizer: str
    adapted_layers: int
    notes: list[str]
    check: ExportCheck | None = None


class PushedAdapter(Stored):
    """The adapter itself in a repository of the Hub: the name that it has there, the commit, where to look."""

    repo_id: str
    commit: str
    url: str


class ExportChange(Stored):
    """A state of an export, and since when."""

    state: ExportState
    at: str


ExportSettings = MergedSettings | GgufSettings | PushSettings
ExportResult = MergedModel | GgufFile | PushedAdapter
SETTINGS: Mapping[ExportKind, type[ExportSettings]] = MappingProxyType(
    {ExportKind.MERGED: MergedSettings, ExportKind.GGUF: GgufSettings, ExportKind.PUSH: PushSettings}
)
RESULTS: Mapping[ExportKind, type[ExportResult]] = MappingProxyType(
    {ExportKind.MERGED: MergedModel, ExportKind.GGUF: GgufFile, ExportKind.PUSH: PushedAdapter}
)
