"""What a finished training run was, in figures: the engine says it, the job and the adapter keep it."""

from pydantic import Field

from domain.jobs.stored import Stored


class RunOutcome(Stored):
    """What a run did. Losses are means a trained token; None where nothing was evaluated.

    Attributes:
        adapter_step: The step whose parameters are handed out: the last, or with early stopping the best evaluated.
        tokens: All non-padding tokens that were trained on.
    """

    steps: int
    adapter_step: int
    first_loss: float
    final_loss: float
    initial_eval_loss: float | None
    final_eval_loss: float | None
    best_eval_loss: float | None
    tokens: int
    elapsed_s: float
    stopped_early: bool
    stopped_on_request: bool


class TrainingFigures(RunOutcome):
    """What a run did, and on what.

    Attributes:
        rows: Rows that were trained on; rows with nothing to learn are left out.
        memory_bytes: What the engine holds after the run.
    """

    trainable_parameters: int
    rows: int
    validation_rows: int
    memory_bytes: int


class JobResult(TrainingFigures):
    """What a job keeps of its end: the figures, which the oldest records have fewer of, and the engine's last lines."""

    adapter_step: int | None = None  # type: ignore[assignment]
    best_eval_loss: float | None = None
    stopped_on_request: bool = False
    log_tail: list[str] = Field(default_factory=list)
