"""The adapters that runs continue."""

import json
from pathlib import Path

from core.errors import AdapterDamaged, AdapterNotContinuable
from core.singleton import singleton
from domain.adapter_files import CONFIG
from domain.peft.algorithms import Algorithm
from domain.peft.config import recorded
from domain.peft.initial_adapter import CannotContinue, InitialAdapter, read_initial_adapter
from services.adapter_service import AdapterService, get_adapter_service


class InitialAdapters:
    """Reads what an adapter decides of the run that continues it.

    Args:
        adapters: Where they are.
    """

    def __init__(self, adapters: AdapterService) -> None:
        self._adapters = adapters

    def get(self, adapter_id: str) -> InitialAdapter:
        """Return what one decides.

        Raises:
            AdapterNotFound: There is none of that id.
            AdapterDamaged: A file of it is not as it was written.
            AdapterNotContinuable: No run can continue it.
        """
        record = self._adapters.verified(adapter_id)
        try:
            stored = json.loads((Path(record.path) / CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            raise AdapterDamaged(f"The adapter {adapter_id} is damaged: {CONFIG} cannot be read.") from error
        try:
            return read_initial_adapter(
                adapter_id,
                record.base_model_id,
                record.base_revision,
                Algorithm(record.algorithm),
                stored,
                recorded(record.config) if record.config is not None else None,
            )
        except CannotContinue as error:
            raise AdapterNotContinuable(f"{error}; train a new adapter.") from error


@singleton
def get_initial_adapters() -> InitialAdapters:
    """Return the process's reader of the adapters that runs continue."""
    return InitialAdapters(get_adapter_service())
