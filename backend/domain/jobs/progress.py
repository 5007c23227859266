"""How far a training job is: the rules by which an engine's events move it on."""

from typing import Literal, Self

from domain.jobs.stored import Stored


class PreferenceFigures(Stored):
    """How far preferences are learned, as means over the examples of a step or an evaluation.

    Attributes:
        margin: β times by how much more the better answers have gained on the base than the worse ones; with ORPO λ
            times the difference of their mean log-probabilities; with KTO β times what good answers have gained and bad
            ones lost.
        accuracy: The share of examples in which the better side is ahead, 0..1.
        answer_loss: ORPO's cross-entropy of the better answers.
        moved: KTO's measure of how far the model has moved from the base in general.
    """

    margin: float
    accuracy: float
    answer_loss: float | None = None
    moved: float | None = None


class StepFigures(Stored):
    """One optimizer step. `tokens` counts all non-padding tokens so far; times are seconds.

    `grad_norm` is None where fp16 gradients overflowed and the step was left out; `step_s` and `step_tokens` are None
    in the oldest records. `preference` is there where preferences are learned, `token_accuracy` where answers are: the
    share of trained tokens that the model found likeliest, 0..1, before the step; None where the engine does not say.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    token_accuracy: float | None = None
    preference: PreferenceFigures | None = None
    step_s: float | None = None
    step_tokens: int | None = None
    tokens: int
    tokens_per_s: float
    memory_bytes: int
    elapsed_s: float
    eta_s: float


class EngineUsed(Stored):
    """What trains a job: why this engine, and which layers the adapter trains through once that is known."""

    name: Literal["transformers", "unsloth"]
    reason: str
    computation: str | None = None


class JobProgress(Stored):
    """How far a job is. A run that goes on from a checkpoint takes some steps again: they are the same steps.

    Attributes:
        step: The newest step, of the run that goes on.
        recorded_step: The newest step whose metrics are recorded, of any run.
        evaluated_step: The newest step whose evaluation is recorded; -1 for none.
        checkpoint_step: The newest step of which there was a checkpoint; -1 for none.
        fraction: Of all steps, 0..1.
        last: The newest step's figures.
        engine: None before the job has a base.
        forced: Whether a client wants it run even if it is estimated not to fit.
        hands_out: Whether its next run trains nothing and hands out the adapter as it is.
    """

    step: int = 0
    recorded_step: int = 0
    evaluated_step: int = -1
    checkpoint_step: int = -1
    total_steps: int | None = None
    epoch: float | None = None
    fraction: float = 0.0
    eta_s: float | None = None
    tokens_per_s: float | None = None
    last: StepFigures | None = None
    engine: EngineUsed | None = None
    forced: bool = False
    hands_out: bool = False

    def begun_with(self, step: int) -> Self:
        """Return it for a job that begins with another's checkpoint of this step."""
        return self.model_copy(update={"step": step, "recorded_step": step})

    def on_engine(self, engine: EngineUsed) -> Self:
        """Return it once the job has a base."""
        return self.model_copy(update={"engine": engine})

    def computed(self, how: str) -> Self:
        """Return it once it is known which layers the adapter trains through."""
        engine = self.engine.model_copy(update={"computation": how}) if self.engine is not None else None
        return self.model_copy(update={"engine": engine})

    def started(self, step: int, total_steps: int) -> Self:
        """Return it at the start of a run, at its first step or at a checkpoint's."""
        return self.model_copy(update={"step": step, "total_steps": total_steps})

    def stepped(self, figures: StepFigures) -> Self:
        """Return it after an optimizer step."""
        return self.model_copy(
            update={
                "step": figures.step,
                "recorded_step": max(figures.step, self.recorded_step),
                "total_steps": figures.total_steps,
                "epoch": figures.epoch,
                "fraction": figures.step / figures.total_steps,
                "eta_s": figures.eta_s,
                "tokens_per_s": figures.tokens_per_s,
                "last": figures,
            }
        )

    def evaluated(self, step: int) -> Self:
        """Return it after an evaluation."""
        return self.model_copy(update={"evaluated_step": max(step, self.evaluated_step)})

    def paused(self, *, hands_out: bool) -> Self:
        """Return it for a job that a failure paused."""
        return self.model_copy(update={"hands_out": hands_out})

    def kept(self, step: int) -> Self:
        """Return it after a checkpoint."""
        return self.model_copy(update={"checkpoint_step": max(step, self.checkpoint_step)})
