"""Whether a load or a run may begin: what is free, what is promised already, and the refusals that say what to do."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from core.errors import DoesNotFit, ModelRejected
from domain.memory.verdict import Assessment
from services.hardware.devices import Device
from services.loading.loaded_base import LoadedBase


def with_room(device: Device, bases: Iterable[LoadedBase], own: LoadedBase | None = None) -> Device:
    """Return a device with what a new load, or a run on a loaded base, may use of it.

    Loads under way have not yet taken all the memory that they will need. That part is not free. The memory that the
    run's own base holds is part of the run's estimate. It counts as free.

    Args:
        device: With what the system reports as free.
        bases: Every base there is.
        own: The base that the run will use.
    """
    if device.available_bytes is None:
        return device
    under_way = [base for base in bases if base.under_way and base.key.device == device.torch_name and base is not own]
    promised = sum(max(0, (base.wanted.needed_bytes or 0) - base.resident_bytes) for base in under_way)
    held = own.resident_bytes if own is not None else 0
    return replace(device, available_bytes=max(0, device.available_bytes - promised + held))


def next_to_give_way(
    device: Device,
    bases: Iterable[LoadedBase],
    judge: Callable[[Device], Assessment],
    own: LoadedBase | None,
    idle_s: float,
) -> LoadedBase | None:
    """Return the idle base to unload next for something that does not fit; None if unloading would not help.

    The base that has been unused for longest goes first. A base that a job loaded for itself goes as soon as the job
    has left it. A base that a client asked for goes after `idle_s` seconds without use.

    Args:
        device: With the memory that may be used of it now.
        bases: Every base there is.
        judge: Says whether the load or run fits on a device.
        own: The base that the run uses. It stays.
        idle_s: Seconds without use after which a client's base gives way.
    """
    if device.available_bytes is None:
        return None
    idle = [
        base
        for base in bases
        if base is not own and base.key.device == device.torch_name and base.idle_for(idle_s, unkept_s=0.0)
    ]
    freed = sum(base.resident_bytes for base in idle)
    roomy = replace(device, available_bytes=device.available_bytes + freed)
    if not idle or judge(roomy).verdict == "does_not_fit":
        return None
    return min(idle, key=lambda base: base.use.last_s)


def refuse_what_is_blocked(assessment: Assessment, what: str) -> None:
    """Refuse a load or run that would fail with any amount of memory, before anything is downloaded.

    Raises:
        ModelRejected: With the reasons.
    """
    if assessment.blockers:
        raise ModelRejected(f"{what} would fail: {'; '.join(assessment.blockers)}.")


def refuse_what_does_not_fit(assessment: Assessment, what: str, device: Device) -> None:
    """Refuse a load or run that is estimated not to fit. One without an estimate is admitted.

    Raises:
        DoesNotFit: With the estimate and the changes that would make it fit.
    """
    if assessment.verdict != "does_not_fit" or assessment.estimate is None:
        return
    needed, free = assessment.estimate, assessment.available_bytes
    said = f"{what} needs about {needed.total_bytes} bytes on {device.torch_name}, where {free} can be had"
    host = device.facts.unsloth.host_available_bytes if device.facts.unsloth is not None else None
    if host is not None and needed.host_bytes > host:
        said += f", and {needed.host_bytes} bytes of host memory, where {host} are free"
    raise DoesNotFit(
        f"{said}. Unload another model, make one of the suggested changes, or send force=true to try all the same.",
        estimate_bytes=assessment.estimate.total_bytes,
        available_bytes=assessment.available_bytes,
        estimate=asdict(assessment.estimate),
        suggestions=[{**asdict(item), "overrides": dict(item.overrides)} for item in assessment.suggestions],
    )
