"""Names of models: OpenAI's own, which stand for local bases, and those of fine-tuned models and checkpoints.

A fine-tuned model is `ft:<base>:<org>:<suffix>:<id>`, its checkpoint at a step the same with `:ckpt-step-N`. The base's
name may hold a slash, none of the others holds one or a colon.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

ORGANIZATION = "local"
ORGANIZATION_ID = "org-local"
_FINE_TUNED = re.compile(
    r"ft:(?P<base>[^:]+):(?P<org>[^:]*):(?P<suffix>[^:]*):(?P<id>[0-9a-z]+)(:ckpt-step-(?P<step>\d+))?"
)
_NOT_IN_SUFFIX = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class FineTunedName:
    """What the name of a fine-tuned model says.

    Attributes:
        id: What tells it from the others; the job and its adapter have it in their ids.
        step: Of a checkpoint; None for the model that the job came to.
    """

    base: str
    suffix: str
    id: str
    step: int | None = None

    def __str__(self) -> str:
        name = f"ft:{self.base}:{ORGANIZATION}:{self.suffix}:{self.id}"
        return name if self.step is None else f"{name}:ckpt-step-{self.step}"

    def at(self, step: int | None) -> "FineTunedName":
        """Return the name of its checkpoint at a step."""
        return FineTunedName(self.base, self.suffix, self.id, step)


def is_fine_tuned(name: str) -> bool:
    """Tell whether a name is that of a fine-tuned model, sound or not."""
    return name.startswith("ft:")


def read_fine_tuned(name: str) -> FineTunedName | None:
    """Read the name of a fine-tuned model; None if it is none."""
    read = _FINE_TUNED.fullmatch(name)
    if read is None:
        return None
    step = int(read["step"]) if read["step"] is not None else None
    return FineTunedName(read["base"], read["suffix"], read["id"], step)


def suffix_in_name(suffix: str | None) -> str:
    """Return a suffix as it stands in a name: what would end or split the name becomes a hyphen."""
    return _NOT_IN_SUFFIX.sub("-", suffix or "")


def id_in_name(own_id: str) -> str:
    """Return the id that a job and its adapter share in the names of the models: `job_x` and `adp_x` are x."""
    return own_id.partition("_")[2]


def stands_for(name: str, names: Sequence[tuple[str, str]]) -> str | None:
    """Return the local base that a name stands for by the settings; None if it stands for none.

    Args:
        names: Pairs of a name and a base, the first that fits counts. A name may hold `*`.
    """
    return next((base for pattern, base in names if fnmatchcase(name, pattern)), None)
