"""Trained adapters: immutable folders and their records."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from core.errors import AdapterDamaged, AdapterInUse, AdapterNotFound
from core.files import plain_files
from core.manifest import NAME, FolderDamaged, verify
from core.settings import get_settings
from core.singleton import singleton
from core.zip_stream import zip_files
from domain.adapter_files import CARD, ORIGINALS
from domain.jobs.export_states import FINAL_STATES, ExportState
from domain.jobs.states import FINAL_STATES as FINAL_JOB_STATES
from domain.jobs.states import JobState
from services.peft_service import PeftService, get_peft_service
from store.database import Database, get_database
from store.records import AdapterRecord
from store.repositories import Adapters, Exports, Jobs


class AdapterService:
    """Lists, hands out and deletes adapters.

    Args:
        folder: Has a sub-folder for each adapter, as PEFT loads it.
    """

    def __init__(self, database: Database, folder: Path, peft: PeftService) -> None:
        self._database, self._folder, self._peft = database, folder, peft
        folder.mkdir(parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        """Delete what a killed server has left: unfinished adapters and uploads, and copies of bases' weights."""
        for pattern in (".adp_*.tmp", f"{ORIGINALS}*", "pissa-*"):  # the last is an earlier version's
            for path in self._folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def path_for(self, adapter_id: str) -> Path:
        """Return where an adapter's folder is, or will be."""
        return self._folder / adapter_id

    def all(self) -> list[AdapterRecord]:
        """Return every adapter, newest first."""
        with self._database.begin() as connection:
            return Adapters(connection).all()

    def get(self, adapter_id: str) -> AdapterRecord:
        """Return one adapter.

        Raises:
            AdapterNotFound: There is none of that id.
        """
        with self._database.begin() as connection:
            record = Adapters(connection).get(adapter_id)
        if record is None:
            raise AdapterNotFound(f"No adapter has the id {adapter_id}.")
        return record

    def add(self, record: AdapterRecord) -> AdapterRecord:
        """Store the record of an adapter whose folder is there; return it with its version."""
        with self._database.begin() as connection:
            Adapters(connection).add(record)
        return self.get(record.id)

    def files(self, adapter_id: str) -> list[tuple[str, int]]:
        """Return the adapter's files as (name, bytes), by name."""
        folder = Path(self.get(adapter_id).path)
        return [(name, path.stat().st_size) for name, path in plain_files(folder)]

    def card(self, adapter_id: str) -> dict[str, Any] | None:
        """Return the adapter's card without the losses of each step; None without a card."""
        path = Path(self.get(adapter_id).path) / CARD
        try:
            card = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return {name: value for name, value in card.items() if name != "losses"} if isinstance(card, dict) else None

    def verified(self, adapter_id: str) -> AdapterRecord:
        """Return one adapter, after a check that every file is as it was written.

        Raises:
            AdapterNotFound: There is none of that id.
            AdapterDamaged: Some file is not.
        """
        record = self.get(adapter_id)
        if (Path(record.path) / NAME).exists():  # the first version's adapters have no sums
            try:
                verify(Path(record.path))
            except FolderDamaged as error:
                raise AdapterDamaged(f"The adapter {adapter_id} is damaged: {error}.") from error
        return record

    def zipped(self, adapter_id: str) -> Iterator[bytes]:
        """Yield a zip of the folder, made as it is read."""
        return zip_files(plain_files(Path(self.get(adapter_id).path)))

    def delete(self, adapter_id: str) -> None:
        """Delete an adapter, taking it off loaded models first.

        Raises:
            AdapterNotFound: There is none of that id.
            AdapterInUse: An export of it, or a job that continues it, has not ended.
            ModelBusy: A model that has it is training.
        """
        record = self.get(adapter_id)
        with self._database.begin() as connection:
            _refuse_in_use(connection, adapter_id)
        self._peft.detach_everywhere(adapter_id)
        with self._database.begin() as connection:
            _refuse_in_use(connection, adapter_id)  # again, now that nobody else can write
            Adapters(connection).delete(adapter_id)
        shutil.rmtree(record.path, ignore_errors=True)


def _refuse_in_use(connection: Connection, adapter_id: str) -> None:
    unfinished = Exports(connection).all(adapter_id, frozenset(ExportState) - FINAL_STATES)
    if unfinished:
        raise AdapterInUse(f"The export {unfinished[0].id} has not ended; cancel it first.")
    continuing = Jobs(connection).continuing(adapter_id, frozenset(JobState) - FINAL_JOB_STATES)
    if continuing:
        raise AdapterInUse(f"The job {continuing[0]} begins with it and has not ended; cancel it first.")


@singleton
def get_adapter_service() -> AdapterService:
    """Return the process's adapter service."""
    return AdapterService(get_database(), get_settings().home / "adapters", get_peft_service())
