"""How often a job that was cut off is started again, and how long it waits."""

# A death after a checkpoint costs nothing, so only deaths without one in between count.
MAX_STALLS = 5
GIVEN_UP = f" This was the {MAX_STALLS}th time in a row without a checkpoint in between."  # the end of such an error
_LONGEST_WAIT_S = 60.0
# Classes that trying again cannot help: the same memory, data and settings fail the same way.
TRANSIENT = frozenset(
    {
        *("engine_killed", "engine_crash", "engine_unresponsive", "worker_died", "server_ended"),
        *("hub_unavailable", "engine_unavailable", "database_unavailable", "model_not_ready"),
    }
)


def wait_s(stalls: int) -> float:
    """Return the seconds to wait after the `stalls`-th death in a row without a checkpoint: 0, 2, 4, 8 and so on."""
    return min(_LONGEST_WAIT_S, 2.0**stalls) if stalls > 0 else 0.0
