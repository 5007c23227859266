"""The records of exports. Nothing else changes them."""

from dataclasses import replace
from typing import Any

from core.clock import Clock
from core.errors import AdapterNotFound, ExportNotFound, TransitionNotPermitted
from core.logging import get_logger
from domain.exports import ExportChange
from domain.jobs.export_states import ExportState, may_change
from store.database import Database
from store.records import ExportRecord, to_text
from store.repositories import Adapters, Exports

_log = get_logger(__name__)


class ExportLedger:
    """Reads and changes the records of exports, each change in one transaction."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def get(self, export_id: str) -> ExportRecord:
        """Return one export.

        Raises:
            ExportNotFound: There is none of that id.
        """
        with self._database.begin() as connection:
            record = Exports(connection).get(export_id)
        if record is None:
            raise ExportNotFound(f"No export has the id {export_id}.")
        return record

    def all(self, adapter_id: str | None = None, states: frozenset[ExportState] | None = None) -> list[ExportRecord]:
        """Return exports, newest first: of one adapter or of all, in some states or in all."""
        with self._database.begin() as connection:
            return Exports(connection).all(adapter_id, states)

    def add(self, record: ExportRecord) -> ExportRecord:
        """Store a new export with the next sequence number.

        Raises:
            AdapterNotFound: The adapter has been deleted.
        """
        with self._database.begin() as connection:
            if Adapters(connection).get(record.adapter_id) is None:
                raise AdapterNotFound(f"No adapter has the id {record.adapter_id}.")
            record = replace(record, sequence=Exports(connection).next_sequence())
            Exports(connection).add(record)
        return record

    def move(self, record: ExportRecord, following: ExportState, **columns: Any) -> bool:
        """Change an export's state if it is still as given; tell whether it was.

        Raises:
            TransitionNotPermitted: The table of transitions does not allow it.
        """
        if not may_change(record.state, following):
            raise TransitionNotPermitted(f"An export cannot go from {record.state.value} to {following.value}.")
        history = [*record.history, ExportChange(state=following, at=to_text(self._clock.now()))]
        with self._database.begin() as connection:
            changed = Exports(connection).change_state(record, following, history=history, **columns)
        if changed:
            _log.info("export.state", export_id=record.id, state=following.value)
        return changed

    def request_cancel(self, export_id: str) -> None:
        """Record that a running export is to be cancelled."""
        with self._database.begin() as connection:
            Exports(connection).request_cancel(export_id)

    def delete(self, export_id: str) -> None:
        """Forget an export."""
        with self._database.begin() as connection:
            Exports(connection).delete(export_id)
