"""Fine-tunes as OpenAI's API asks for them and shows them."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from domain.jobs.states import JobState
from domain.openai.files import file_of_dataset, results_of_job
from domain.openai.names import ORGANIZATION_ID, FineTunedName, id_in_name, suffix_in_name
from domain.peft.config import PeftConfig

# How many passes "auto" means. Source: OpenAI's cookbook, chat_finetuning_data_prep: three, but at least a hundred
# examples in all and at most 25,000, within 1 to 25 passes.
_TARGET_EPOCHS, _FEWEST_EXAMPLES, _MOST_EXAMPLES, _MOST_EPOCHS = 3, 100, 25_000, 25
_MOST_ROWS_AT_ONCE = 16  # a larger batch is gathered over several forward passes
KEPT_CHECKPOINTS = 3  # OpenAI keeps those of the last three epochs
_S = JobState
_STATUS = {
    _S.QUEUED: "queued",
    _S.INTERRUPTED: "queued",  # it goes on by itself
    _S.PREPARING: "running",
    _S.RUNNING: "running",
    _S.PAUSING: "running",
    _S.PAUSED: "paused",
    _S.SUCCEEDED: "succeeded",
    _S.FAILED: "failed",
    _S.CANCELLED: "cancelled",
}


@dataclass(frozen=True)
class Hyperparameters:
    """What a client sets itself; None stands for "auto".

    Attributes:
        batch_size: Rows an optimizer step.
        learning_rate_multiplier: Of the rate that the service would choose.
        beta: DPO's β.
    """

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    beta: float | None = None


@dataclass(frozen=True)
class OwnOptions:
    """The options of this service, which OpenAI's API does not have: `peft` in the request."""

    algorithm: str | None = None
    use_case: str | None = None
    revision: str | None = None
    loaded_model_id: str | None = None
    validation_fraction: float = 0.0
    name: str | None = None
    priority: int = 0
    resume_from: str | None = None
    gpus: int = 1
    force: bool = False
    initial_adapter_id: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FineTuneWish:
    """A client's request for a fine-tune, in OpenAI's terms.

    Attributes:
        method: None where the client names none, which is `supervised` unless `own` names another objective.
    """

    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int | None
    metadata: dict[str, str] | None
    hyperparameters: Hyperparameters
    own: OwnOptions
    method: Literal["supervised", "dpo"] | None = None


def clashes(wish: FineTuneWish) -> list[tuple[str, str]]:
    """Return the options that are set twice, as (field, what is wrong)."""
    hyper, own = wish.hyperparameters, wish.own.overrides
    pairs = (
        ("n_epochs", hyper.n_epochs, ("epochs", "max_steps")),
        ("batch_size", hyper.batch_size, ("batch_size", "gradient_accumulation")),
        ("learning_rate_multiplier", hyper.learning_rate_multiplier, ("learning_rate",)),
        ("seed", wish.seed, ("seed",)),
        ("beta", hyper.beta, ("preference_beta",)),
        ("method", wish.method, ("objective",)),
    )
    return [
        (name, f"peft.{other} says the same; send one of them")
        for name, value, others in pairs
        for other in others
        if value is not None and other in own
    ]


def auto_epochs(rows: int) -> int:
    """Return how many passes "auto" means for a file of so many rows."""
    if rows * _TARGET_EPOCHS < _FEWEST_EXAMPLES:
        return min(_MOST_EPOCHS, max(1, _FEWEST_EXAMPLES // rows))
    if rows * _TARGET_EPOCHS > _MOST_EXAMPLES:
        return max(1, _MOST_EXAMPLES // rows)
    return _TARGET_EPOCHS


def first_overrides(wish: FineTuneWish, rows: int) -> dict[str, Any]:
    """Return the settings that follow from the request alone.

    Args:
        rows: Of the training file.
    """
    hyper, own = wish.hyperparameters, wish.own.overrides
    overrides: dict[str, Any] = {}
    if not {"epochs", "max_steps"} & own.keys():
        overrides["epochs"] = float(hyper.n_epochs or auto_epochs(rows))
    if hyper.batch_size is not None:
        at_once = _largest_part(hyper.batch_size)
        overrides |= {"batch_size": at_once, "gradient_accumulation": hyper.batch_size // at_once}
    if wish.seed is not None:
        overrides["seed"] = wish.seed
    overrides["objective"] = "dpo" if wish.method == "dpo" else "sft"
    if hyper.beta is not None:
        overrides["preference_beta"] = hyper.beta
    return overrides | own


def _largest_part(batch_size: int) -> int:
    return next(part for part in range(min(batch_size, _MOST_ROWS_AT_ONCE), 0, -1) if batch_size % part == 0)


def with_the_rest(wish: FineTuneWish, overrides: dict[str, Any], config: PeftConfig, rows: int) -> dict[str, Any]:
    """Return the settings with those that follow from what the service has chosen.

    The learning rate is multiplied. An epoch's end has a checkpoint, and an evaluation where there is something to
    evaluate; of a packed run, whose steps cannot be counted beforehand, the checkpoints go by time.

    Args:
        overrides: Of `first_overrides`.
        config: What the service makes of them.
        rows: Of the training file.
    """
    more: dict[str, Any] = {}
    factor = wish.hyperparameters.learning_rate_multiplier
    if factor is not None:
        more["learning_rate"] = min(1.0, config.learning_rate * factor)
    batches = -(-rows // config.batch_size)
    steps = -(-batches // config.gradient_accumulation)
    if not config.packing:
        more["checkpoint_every_steps"] = steps
        if wish.validation_file is not None or wish.own.validation_fraction > 0:
            more["eval_every_steps"] = steps
    more["keep_checkpoints"] = KEPT_CHECKPOINTS
    return more | overrides


@dataclass(frozen=True)
class JobFacts:
    """What a job is, as far as OpenAI's API shows it. The store's record is read into this.

    Attributes:
        asked_model: The model's name as it was sent: of a base, or of the fine-tuned model that the job continues.
        base_name: The base's name.
        eta_s: Seconds to the end; None where that is not known.
        tokens: Trained on, once it has succeeded.
        error: (code, message) of a job that failed.
    """

    id: str
    state: JobState
    asked_model: str
    base_name: str
    suffix: str | None
    learning_rate_multiplier: float | None
    metadata: dict[str, str] | None
    config: PeftConfig
    training_file: str
    validation_file: str | None
    created_at: str
    finished_at: str | None
    eta_s: float | None
    tokens: int | None
    error: tuple[str, str] | None
    has_model: bool


def name_of(facts: JobFacts) -> FineTunedName:
    """Return the name of the model that a job trains."""
    return FineTunedName(facts.base_name, suffix_in_name(facts.suffix), id_in_name(facts.id))


def as_seconds(moment: str) -> int:
    """Return a stored time as Unix seconds."""
    return int(datetime.fromisoformat(moment).timestamp())


def job_body(facts: JobFacts, now: datetime) -> dict[str, Any]:
    """Show a job: every key of OpenAI's `fine_tuning.job` is there."""
    hyperparameters = {
        "n_epochs": int(facts.config.epochs)
        if facts.config.epochs == int(facts.config.epochs)
        else facts.config.epochs,
        "batch_size": facts.config.batch_size * facts.config.gradient_accumulation,
        "learning_rate_multiplier": facts.learning_rate_multiplier or 1.0,
    }
    running = facts.state is JobState.RUNNING and facts.eta_s is not None
    succeeded = facts.state is JobState.SUCCEEDED
    return {
        "id": ftjob(facts.id),
        "object": "fine_tuning.job",
        "created_at": as_seconds(facts.created_at),
        "error": _error(facts),
        "fine_tuned_model": str(name_of(facts)) if facts.has_model else None,
        "finished_at": as_seconds(facts.finished_at) if facts.finished_at is not None else None,
        "hyperparameters": hyperparameters,
        "model": facts.asked_model,
        "organization_id": ORGANIZATION_ID,
        "result_files": [results_of_job(facts.id)] if succeeded else [],
        "seed": facts.config.seed,
        "status": _STATUS[facts.state],
        "trained_tokens": facts.tokens if succeeded else None,
        "training_file": facts.training_file,
        "validation_file": facts.validation_file,
        "estimated_finish": int(now.timestamp() + (facts.eta_s or 0.0)) if running else None,
        "integrations": [],
        "metadata": facts.metadata,
        "method": _method(facts.config, hyperparameters),
    }


def _method(config: PeftConfig, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Show how a job learns; ORPO and KTO, which OpenAI's API does not have, under their own names."""
    if config.objective == "sft":
        return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return {
        "type": config.objective,
        config.objective: {"hyperparameters": {**hyperparameters, "beta": config.preference_beta}},
    }


def _error(facts: JobFacts) -> dict[str, Any] | None:
    if facts.error is None or facts.state is not JobState.FAILED:
        return None
    code, message = facts.error
    return {"code": code, "message": message, "param": "training_file" if code == "bad_data" else None}


def ftjob(job_id: str) -> str:
    """Return a job's id in OpenAI's form."""
    return "ftjob-" + job_id.removeprefix("job_")


def job_of(ftjob_id: str) -> str:
    """Return the job that an id of OpenAI's form names."""
    return "job_" + ftjob_id.removeprefix("ftjob-")


def training_file_of(dataset_id: str) -> str:
    """Return the file of a job's dataset."""
    return file_of_dataset(dataset_id)
