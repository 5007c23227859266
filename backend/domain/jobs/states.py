"""States of a training job and the only changes between them."""

from enum import StrEnum

from domain.jobs.transitions import Transitions


class JobState(StrEnum):
    """Where a job is.

    `interrupted` is the server's or the engine's death, not the job's fault: it is queued again by itself. `paused`
    waits for a person. `failed` always says why.
    """

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = JobState
TRANSITIONS = Transitions(
    {
        _S.QUEUED: frozenset({_S.PREPARING, _S.PAUSED, _S.CANCELLED, _S.FAILED}),
        _S.PREPARING: frozenset({_S.RUNNING, _S.PAUSING, _S.PAUSED, _S.CANCELLED, _S.FAILED, _S.INTERRUPTED}),
        _S.RUNNING: frozenset({_S.PAUSING, _S.PAUSED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED, _S.INTERRUPTED}),
        _S.PAUSING: frozenset({_S.PAUSED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED, _S.INTERRUPTED}),
        _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
        _S.INTERRUPTED: frozenset({_S.QUEUED, _S.PAUSED, _S.CANCELLED, _S.FAILED}),
        _S.SUCCEEDED: frozenset(),
        _S.FAILED: frozenset(),
        _S.CANCELLED: frozenset(),
    }
)

FINAL_STATES = TRANSITIONS.final
may_change = TRANSITIONS.allow
# States in which an engine may be working for the job.
ACTIVE_STATES = frozenset({JobState.PREPARING, JobState.RUNNING, JobState.PAUSING})
