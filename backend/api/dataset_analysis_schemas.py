"""Requests and responses of /api/datasets/{id}/analyze."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from api.peft_schemas import ModelId, Overrides, Request, Response, Revision
from domain.peft.algorithms import Algorithm, AlgorithmName
from domain.peft.config import PeftConfig, PeftOverrides
from domain.peft.use_cases import UseCaseId
from domain.results import DatasetFigures
from services.training.dataset_analysis import Analysis


class AnalyzeRequest(Request):
    model_id: ModelId
    revision: Revision | None = None
    max_seq_length: int | None = Field(
        default=None, ge=8, le=1_048_576, description="As in `overrides`; the configuration's own if left out."
    )
    use_case: Annotated[UseCaseId, Field(strict=False)] | None = None
    algorithm: AlgorithmName = Algorithm.LORA
    overrides: Overrides = Field(default_factory=PeftOverrides)
    example_row: int | None = Field(
        default=None, ge=0, description="The row to show, from 0; the first with something to learn if left out."
    )
    wait_s: float = Field(default=120, ge=0, le=600, description="Answer 202 if it takes longer; ask again then.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        sent = self.overrides.sent()
        if self.max_seq_length is not None and sent.get("max_seq_length", self.max_seq_length) != self.max_seq_length:
            raise ValueError("max_seq_length differs from overrides.max_seq_length")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the overrides, the length among them."""
        length = {} if self.max_seq_length is None else {"max_seq_length": self.max_seq_length}
        return self.overrides.sent() | length


class Finding(Response):
    rows: int
    examples: list[int] = Field(description="Some of the rows, from 0, as in the preview.")


class Findings(Response):
    truncated: Finding = Field(description="Conversations that lose their end at max_seq_length.")
    answer_cut: Finding = Field(description="Of those: a part of what would be learned is lost.")
    answer_lost: Finding = Field(description="Of those: all of it is lost.")
    split: Finding = Field(description="Texts that become several rows; none of them is lost.")
    nothing_to_learn: Finding = Field(description="Rows without a trained token; training leaves them out.")
    without_end_mark: Finding = Field(description="Rows whose learned part does not end with a special token.")
    refused: Finding = Field(description="Rows that the chat template will not take; they fail a job.")
    earlier_thinking_left_out: Finding = Field(
        description="Rows of which the chat template leaves out the thinking of an answer before the last one."
    )
    last_thinking_left_out: Finding = Field(
        description="Rows of which the chat template leaves out the last answer's thinking."
    )


class Reason(Response):
    reason: str
    rows: int


class LeftOut(Response):
    what: str = Field(description="`tools`, `reasoning`, or turns of that role.")
    rows: int


class Figures(Response):
    total: int
    minimum: int
    mean: float
    maximum: int
    p50: int
    p90: int
    p95: int
    p99: int


class Bin(Response):
    from_tokens: int
    to_tokens: int
    rows: int


class Epoch(Response):
    rows: int = Field(description="Rows that are trained on, long texts cut into several.")
    sequences: int = Field(description="Rows, or with packing what they are packed into.")
    batches: int
    tokens: int
    trained_tokens: int
    steps: int = Field(description="Optimizer steps an epoch.")
    total_steps: int = Field(description="Of the whole job, by epochs or max_steps.")
    total_tokens: int


class Duration(Response):
    expected_s: float
    tokens_per_s: float
    measured_by_job_id: str = Field(description="The job whose speed was taken.")


class Piece(Response):
    text: str
    trained: bool
    cut_off: bool = Field(description="Behind max_seq_length.")
    tokens: int


class Example(Response):
    row: int
    pieces: list[Piece] = Field(description="The row as the model sees it.")
    complete: bool = Field(description="False if the row is too long to be shown whole.")


class AnalysisResponse(Response):
    dataset_id: str
    model_id: str
    revision: str | None
    config: PeftConfig = Field(description="What a job with the same settings would be configured as.")
    rows: int
    duplicate_rows: int | None
    tokens: Figures = Field(description="A row, before truncation.")
    trained_tokens: Figures = Field(description="A row, after masking and truncation.")
    histogram: list[Bin] = Field(description="Rows by tokens, before truncation.")
    findings: Findings
    refusals: list[Reason] = Field(description="Why the chat template refuses rows.")
    left_out: list[LeftOut] = Field(description="What the chat template drops, in the rows looked at.")
    looked_at_rows: int
    epoch: Epoch
    duration: Duration | None = Field(description="null until a job has trained this model with this algorithm.")
    template: str
    example: Example | None = Field(description="Of a preference the better answer.")
    worse_example: Example | None = Field(description="The same row with its worse answer, where it has two.")
    warnings: list[str]


class AnalysisProgress(Response):
    state: str
    fraction: float


def analysis_view(analysis: Analysis, duplicate_rows: int | None) -> AnalysisResponse:
    """Show an analysis."""
    return AnalysisResponse.model_validate(
        {
            **dict(analysis.figures),
            "dataset_id": analysis.dataset_id,
            "model_id": analysis.model_id,
            "revision": analysis.revision,
            "config": analysis.config,
            "duplicate_rows": duplicate_rows,
            "duration": analysis.duration,
            "warnings": _warnings(analysis.figures, analysis.config),
        }
    )


def _warnings(figures: DatasetFigures, config: PeftConfig) -> list[str]:
    rows, affected = figures.rows, {name: finding.rows for name, finding in figures.findings}
    length = f"max_seq_length={config.max_seq_length}"
    told = {
        "answer_lost": f"lose all that would be learned at {length}",
        "answer_cut": f"lose a part of what would be learned at {length}",
        "nothing_to_learn": "teach nothing and are left out",
        "refused": "are refused by the chat template, so a job would fail",
        "without_end_mark": "do not end with a special token: the model may not learn to stop",
        "earlier_thinking_left_out": "have thinking in an earlier answer that the chat template leaves out",
        "last_thinking_left_out": "have thinking in the last answer that the chat template leaves out",
    }
    warnings = [f"{affected[name]} of {rows} rows {what}" for name, what in told.items() if affected[name]]
    warnings += [
        f"the chat template leaves out {item.what} in {item.rows} of the {figures.looked_at_rows} rows looked at"
        for item in figures.left_out
    ]
    return ([] if figures.epoch.rows else ["nothing would be learned: a job is refused"]) + warnings
