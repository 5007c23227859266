"""Adapters on a base in memory: put there to be used, and taken off."""

from pathlib import Path

from core.errors import ModelBusy, ModelNotReady
from domain import protocol
from services.loading.loaded_base import LoadedBase


def attach(base: LoadedBase, adapter_id: str, path: Path) -> None:
    """Put an adapter on a base, unless it is there already. It stays until the base is unloaded.

    Raises:
        ModelNotReady: The base is not loaded yet, or not any more.
        ModelBusy: A job holds it.
    """
    if adapter_id in base.adapters:
        return
    process = base.engine()
    held = process.request(protocol.AttachAdapter(adapter_id=adapter_id, path=str(path))).result()
    base.touch()
    base.attached(adapter_id, held.memory_bytes)


def detach(base: LoadedBase, adapter_id: str) -> None:
    """Take an adapter off a base, if it is on it.

    Raises:
        ModelBusy: A job holds the base.
    """
    if adapter_id not in base.adapters:
        return
    if base.busy_with is not None:
        raise ModelBusy(f"The base of the adapter is {base.busy_with}.")
    try:
        process = base.engine()
    except ModelNotReady:
        return  # the base is being unloaded, and the adapter with it
    held = process.request(protocol.DetachAdapter(adapter_id=adapter_id)).result()
    base.detached(adapter_id, held.memory_bytes)
