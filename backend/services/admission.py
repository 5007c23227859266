"""Whether a load or a run may begin: what is free, what is promised already, and the refusal that says what to do."""

from collections.abc import Iterable
from dataclasses import asdict, replace

from core.errors import DoesNotFit
from domain.memory_verdict import Assessment
from services.devices import Device
from services.loaded_base import LoadedBase


def with_room(device: Device, bases: Iterable[LoadedBase], own: LoadedBase | None = None) -> Device:
    """Return a device with what a new load, or a run on a loaded base, may use of it.

    Loads under way have not taken yet what they will need, so that is not free; what the run's own base holds
    already is in its estimate, so it counts as free.

    Args:
        device: With what the system reports as free.
        bases: Every base there is.
        own: The base that the run will use.
    """
    if device.available_bytes is None:
        return device
    under_way = [base for base in bases if base.under_way and base.key.device == device.torch_name and base is not own]
    promised = sum(max(0, (base.needed_bytes or 0) - base.resident_bytes) for base in under_way)
    held = own.resident_bytes if own is not None else 0
    return replace(device, available_bytes=max(0, device.available_bytes - promised + held))


def refuse_what_does_not_fit(found: Assessment, what: str, device: Device) -> None:
    """Raise for an assessment that says so; what is not known is admitted.

    Raises:
        DoesNotFit: With the estimate and the changes that would make it fit.
    """
    if found.verdict != "does_not_fit" or found.estimate is None:
        return
    raise DoesNotFit(
        f"{what} needs about {found.estimate.total_bytes} bytes on {device.torch_name}, where {found.available_bytes} "
        "can be had. Unload another model, make one of the suggested changes, or send force=true to try all the same.",
        estimate_bytes=found.estimate.total_bytes,
        available_bytes=found.available_bytes,
        estimate=asdict(found.estimate),
        suggestions=[{**asdict(item), "overrides": dict(item.overrides)} for item in found.suggestions],
    )
