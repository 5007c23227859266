"""States of a training job and the only changes between them."""

from enum import StrEnum
from types import MappingProxyType


class JobState(StrEnum):
    """Where a job is.

    `interrupted` is the server's or the engine's death, not the job's fault; `failed` always says why.
    """

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: MappingProxyType[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.PREPARING, JobState.CANCELLED, JobState.FAILED}),
        JobState.PREPARING: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED, JobState.INTERRUPTED}),
        JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.INTERRUPTED}),
        JobState.INTERRUPTED: frozenset({JobState.QUEUED, JobState.CANCELLED, JobState.FAILED}),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.CANCELLED: frozenset(),
    }
)

FINAL_STATES = frozenset(state for state, following in TRANSITIONS.items() if not following)
# States in which an engine may be working for the job.
ACTIVE_STATES = frozenset({JobState.PREPARING, JobState.RUNNING})


def may_change(current: JobState, following: JobState) -> bool:
    """Tell whether a job may go from one state to another."""
    return following in TRANSITIONS[current]
