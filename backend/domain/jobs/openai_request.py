"""What OpenAI's API shows of the request that made a job, beside what any job keeps."""

from domain.jobs.stored import Stored


class OpenAIRequest(Stored):
    """A fine-tune as a client of OpenAI's API asked for it.

    Attributes:
        model: The base's name as it was sent. It may be OpenAI's own, which stands for a local model.
        suffix: What the fine-tuned model's name has in it.
        learning_rate_multiplier: Of the rate that the service chooses; None for that rate itself.
        metadata: The client's own pairs; None where none were sent.
    """

    model: str
    suffix: str | None = None
    learning_rate_multiplier: float | None = None
    metadata: dict[str, str] | None = None
