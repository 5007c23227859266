"""How the loaded model that a job names was loaded."""

from typing import Literal

from domain.jobs.stored import Stored


class LoadOptions(Stored):
    """How a client had a base loaded, beside what it is: what it takes to load the same again.

    Attributes:
        device: `cpu`, or a GPU's index.
    """

    engine: Literal["transformers", "unsloth"]
    device: str | int
    force: bool
    allow_pickle: bool
