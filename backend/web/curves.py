"""The curves of a run, as columns."""

from typing import Any

from services.training_service import TrainingService

# Figures of a step, in the order in which a page shows them.
METRICS = (
    "loss",
    "token_accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "memory_bytes",
    "preference.margin",
    "preference.accuracy",
)
_EVALUATED = ("eval_loss", "token_accuracy")


def curves(training: TrainingService, job_id: str, metrics: tuple[str, ...] = METRICS) -> dict[str, Any]:
    """Return the figures of all steps and evaluations of a job.

    Returns:
        `steps`: `step` and the metrics, a list each, null where a step has no such figure; `evaluations`: the same,
        with `eval_loss`.

    Raises:
        JobNotFound: There is no such job.
    """
    training.ledger.get(job_id)
    names = ("step", *metrics)
    evaluated = ("step", *_EVALUATED)
    return {
        "steps": dict(zip(names, training.ledger.figures(job_id, "metrics", names), strict=True)),
        "evaluations": dict(zip(evaluated, training.ledger.figures(job_id, "evaluation", evaluated), strict=True)),
    }
