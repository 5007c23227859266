"""States of a base model in memory and the only changes between them."""

from enum import StrEnum
from types import MappingProxyType


class LoadState(StrEnum):
    """Where a base is."""

    QUEUED = "queued"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    UNLOADING = "unloading"


_S = LoadState
TRANSITIONS: MappingProxyType[LoadState, frozenset[LoadState]] = MappingProxyType(
    {
        _S.QUEUED: frozenset({_S.DOWNLOADING, _S.LOADING, _S.FAILED, _S.UNLOADING}),
        _S.DOWNLOADING: frozenset({_S.LOADING, _S.FAILED, _S.UNLOADING}),
        _S.LOADING: frozenset({_S.READY, _S.FAILED, _S.UNLOADING}),
        _S.READY: frozenset({_S.BUSY, _S.FAILED, _S.UNLOADING}),
        _S.BUSY: frozenset({_S.READY, _S.FAILED, _S.UNLOADING}),
        _S.FAILED: frozenset({_S.UNLOADING}),
        _S.UNLOADING: frozenset(),
    }
)

# States in which a base will still take memory for its weights.
UNDER_WAY = frozenset({LoadState.QUEUED, LoadState.DOWNLOADING, LoadState.LOADING})
# States in which a base is loaded and its engine lives.
USABLE = frozenset({LoadState.READY, LoadState.BUSY})
# States in which a base is of no use any more.
GONE = frozenset({LoadState.FAILED, LoadState.UNLOADING})


def may_change(current: LoadState, following: LoadState) -> bool:
    """Tell whether a base may go from one state to another."""
    return following in TRANSITIONS[current]
