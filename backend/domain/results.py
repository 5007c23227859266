"""What an engine answers its commands with. Each command of `domain/protocol.py` names its own.

The answer of a training run is `domain.jobs.figures.TrainingFigures`; those of an export are in `domain/exports.py`.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from domain.models.shape import ModelShape


class Result(BaseModel):
    """Base of the answers, and of their parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WarmedUp(Result):
    """What loads and runs need is imported, and nothing is loaded.

    Attributes:
        gpu_contexts: On how many GPUs the process holds a CUDA context, which takes some of their memory.
    """

    gpu_contexts: int


class Loaded(Result):
    """The base is in memory.

    Attributes:
        memory_bytes: What the engine holds now.
    """

    total_parameters: int
    memory_bytes: int
    load_s: float


class MemoryHeld(Result):
    """The adapter is on the base, or off it, and this is what the engine holds now."""

    memory_bytes: int


class TokenChance(Result):
    """How likely a token was, before temperature, penalties and top_p.

    Attributes:
        token: Its text; of a part of a character, the replacement character.
        bytes: Its bytes.
        logprob: The natural logarithm of its probability; None for the first token of a prompt.
    """

    token: str
    bytes: list[int]
    logprob: float | None


class TokenChances(TokenChance):
    """A token of a text, and the likeliest ones in its place, likeliest first."""

    top: list[TokenChance]


class Generated(Result):
    """A text, and why it ended: by itself or a stop string, or at its greatest length.

    Attributes:
        chat_template: Whose was used; None for a prompt.
        chances: Of each token of the text, if they were asked for.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    elapsed_s: float
    chat_template: str | None
    chances: list[TokenChances] = Field(default_factory=list)


class Described(Result):
    """What a config.json describes.

    Attributes:
        shape: The model, or None.
        problem: Why there is no shape, in words.
        loadable: Whether transformers has a class for it that an engine can load.
    """

    shape: ModelShape | None
    problem: str | None = None
    loadable: bool = True


class Prepared(Result):
    """The folder of the model is whole."""

    path: str


class Finding(Result):
    """Rows of one kind: how many, and some of them by number, from 0."""

    rows: int
    examples: list[int]


class Findings(Result):
    """What may surprise in a dataset. A row may be in several.

    Attributes:
        truncated: Conversations that lose their end at max_seq_length.
        answer_cut: Of those: a part of what would be learned is lost.
        answer_lost: Of those: all of it is lost.
        split: Texts that become several rows; none of them is lost.
        nothing_to_learn: Rows without a trained token.
        without_end_mark: Rows whose learned part does not end with a special token.
        refused: Rows that the chat template will not take.
        earlier_thinking_left_out: Conversations of which the chat template drops the thinking of an answer before the
            last one. Analyses of earlier versions do not have it.
        last_thinking_left_out: Those of which it drops the last answer's. Analyses of earlier versions do not have it.
    """

    truncated: Finding
    answer_cut: Finding
    answer_lost: Finding
    split: Finding
    nothing_to_learn: Finding
    without_end_mark: Finding
    refused: Finding
    earlier_thinking_left_out: Finding = Finding(rows=0, examples=[])
    last_thinking_left_out: Finding = Finding(rows=0, examples=[])


class Refusal(Result):
    """A reason for which the chat template refuses rows."""

    reason: str
    rows: int


class LeftOut(Result):
    """What the chat template drops: `tools`, `reasoning`, or turns of a role."""

    what: str
    rows: int


class TokenFigures(Result):
    """Tokens a row: their sum, extremes, mean and percentiles (nearest rank)."""

    total: int
    minimum: int
    mean: float
    maximum: int
    p50: int
    p90: int
    p95: int
    p99: int


class LengthBin(Result):
    """Rows by tokens; both ends are part of it."""

    from_tokens: int
    to_tokens: int
    rows: int


class EpochFigures(Result):
    """One pass as the trainer makes it, and all of them.

    Attributes:
        rows: Rows that are trained on, long texts cut into several.
        sequences: Rows, or with packing what they are packed into.
        steps: Optimizer steps an epoch.
        total_steps: Of the whole run.
    """

    rows: int
    sequences: int
    batches: int
    tokens: int
    trained_tokens: int
    steps: int
    total_steps: int
    total_tokens: int


class Piece(Result):
    """A part of a rendered row: learned, not learned, or behind max_seq_length."""

    text: str
    trained: bool
    cut_off: bool
    tokens: int


class RenderedRow(Result):
    """A row, by number from 0, as the model sees it. `complete` is False where it is too long to be shown whole."""

    row: int
    pieces: list[Piece]
    complete: bool


class DatasetFigures(Result):
    """What a fine-tune would learn from a dataset.

    Attributes:
        left_out: What the chat template drops, in the rows that were looked at for it.
        tokens: Before truncation.
        trained_tokens: After masking and truncation.
        histogram: Rows by tokens, before truncation. The two answers of a preference count as rows.
        worse_example: The row of `example` with its worse answer, where it has two.
    """

    rows: int
    findings: Findings
    refusals: list[Refusal]
    left_out: list[LeftOut]
    looked_at_rows: int
    tokens: TokenFigures
    trained_tokens: TokenFigures
    histogram: list[LengthBin]
    epoch: EpochFigures
    template: str
    example: RenderedRow | None
    worse_example: RenderedRow | None = None
