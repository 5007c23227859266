"""Exports of an adapter: what kinds there are, their states, and the only changes between them."""

from enum import StrEnum

from domain.jobs.transitions import Transitions


class ExportKind(StrEnum):
    """What is made of an adapter.

    `merged` is a normal model with the adapter's corrections in its weights, `gguf` the same as llama.cpp reads it, and
    `push` the adapter itself in a repository of the Hub.
    """

    MERGED = "merged"
    GGUF = "gguf"
    PUSH = "push"


class ExportState(StrEnum):
    """Where an export is.

    A running one whose server ends is queued again: its folder is whole or absent, so it starts over. One whose engine
    dies has failed, and says how.
    """

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = ExportState
TRANSITIONS = Transitions(
    {
        _S.QUEUED: frozenset({_S.RUNNING, _S.CANCELLED}),
        _S.RUNNING: frozenset({_S.QUEUED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
        _S.SUCCEEDED: frozenset(),
        _S.FAILED: frozenset(),
        _S.CANCELLED: frozenset(),
    }
)

FINAL_STATES = TRANSITIONS.final
may_change = TRANSITIONS.allow
# Starts without an end, because the server ended meanwhile; it may have been the export that ended it.
MAX_ATTEMPTS = 5
