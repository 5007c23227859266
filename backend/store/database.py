"""One engine, migrations on start, and transactions that wait for each other instead of failing."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from core.errors import DatabaseUnavailable, StorageFull
from core.settings import get_settings
from core.singleton import singleton

_MIGRATIONS = Path(__file__).parent / "migrations"
# A PostgreSQL that restarts is back within seconds; 7.7 s in all.
_CONNECT_WAITS_S = (0.1, 0.2, 0.4, 1.0, 2.0, 4.0)
_POSTGRESQL = {"connect_timeout": 10, "options": "-c lock_timeout=30s"}
_NO_ROOM_BYTES = 2**16  # the shared-memory index of a WAL grows by 32 KiB
# Any number that nobody else uses: the lock that makes PostgreSQL's transactions wait for each other.
_LOCK = 0x5046_5354


class Database:
    """The service's tables, on SQLite or PostgreSQL.

    Transactions that write and those that read alike wait for each other: read-then-write is safe without retries,
    and there is one server a database.

    Args:
        url: An SQLAlchemy URL. SQLite runs in WAL mode with synchronous=FULL: a commit that was acknowledged
            is on the disk.
    """

    def __init__(self, url: str) -> None:
        parsed = _with_driver(make_url(url))
        self._on_sqlite = parsed.get_backend_name() == "sqlite"
        if self._on_sqlite and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {"timeout": 30} if self._on_sqlite else _POSTGRESQL
        self.engine: Engine = create_engine(parsed, connect_args=arguments, pool_pre_ping=not self._on_sqlite)
        if self._on_sqlite:
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_immediate)
        else:
            event.listen(self.engine, "begin", _take_lock)

    def migrate(self) -> None:
        """Bring the tables to the newest version, in one transaction."""
        if self.version() == newest_migration():
            return  # without importing Alembic, which costs 0.1 s
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def version(self) -> str | None:
        """Return the migration the database is at, or None for an empty one."""
        with self.begin() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return version

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction; it commits at the end of the block.

        Where the answer to a COMMIT is lost, the database is asked whether it took place.

        Raises:
            StorageFull: The database's disk has no space left; nothing was written.
            DatabaseUnavailable: It does not answer, or another transaction holds it for too long. Nothing was written,
                unless it went away during the COMMIT and stays away: whoever tries again looks first.
        """
        transaction: str | None = None
        try:
            with self._connect() as connection, connection.begin():
                yield connection
                transaction = self._transaction_of(connection)
        except PoolTimeout as error:
            raise DatabaseUnavailable("Every connection to the database is in use.", retry_after_s=5) from error
        except DBAPIError as error:
            if transaction is not None and self._was_committed(transaction):
                return
            if self._says_full(error):
                raise StorageFull("No space is left on the device that holds the database.") from error
            if isinstance(error, OperationalError) or error.connection_invalidated:
                raise DatabaseUnavailable(f"The database does not answer: {error.orig}", retry_after_s=5) from error
            raise

    def _connect(self) -> Connection:
        for wait_s in _CONNECT_WAITS_S:
            try:
                return self.engine.connect()
            except OperationalError:
                if self._on_sqlite:
                    raise
                time.sleep(wait_s)
        return self.engine.connect()

    def _transaction_of(self, connection: Connection) -> str | None:
        """Return PostgreSQL's number of a transaction that has written; a file answers for its own commits."""
        if self._on_sqlite:
            return None
        number: str | None = connection.execute(text("SELECT pg_current_xact_id_if_assigned()::text")).scalar()
        return number

    def _was_committed(self, transaction: str) -> bool:
        """Tell whether a transaction was committed whose COMMIT was not answered; False where nobody can tell.

        Source: pg_xact_status is made for this (PostgreSQL, "Transaction ID and Snapshot Information Functions").
        """
        ask = text("SELECT pg_xact_status(CAST(:number AS xid8))")
        try:
            # To begin takes the lock that the transaction held: by then it is over.
            with self._connect() as connection, connection.begin():
                return connection.execute(ask, {"number": transaction}).scalar() == "committed"
        except (DBAPIError, PoolTimeout):
            return False

    def _says_full(self, error: DBAPIError) -> bool:
        """Tell whether a disk is full: SQLite says so, or an I/O error where there is no room left; or PostgreSQL."""
        name = getattr(error.orig, "sqlite_errorname", None) or ""
        if name.startswith("SQLITE_IOERR") and self.engine.url.database:
            return shutil.disk_usage(Path(self.engine.url.database).parent).free < _NO_ROOM_BYTES
        return name == "SQLITE_FULL" or getattr(error.orig, "sqlstate", None) == "53100"

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def newest_migration() -> str:
    """Return the revision of the newest of Alembic's scripts. The name of its file begins with it."""
    return max(path.name for path in (_MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]


def _with_driver(url: URL) -> URL:
    """Name psycopg 3, the driver that is installed, where a PostgreSQL URL names none."""
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event below starts transactions
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails at once when another wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _take_lock(connection: Connection) -> None:
    # The same order as SQLite's BEGIN IMMEDIATE gives; held to the end of the transaction.
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


@singleton
def get_database() -> Database:
    """Return the process's database, at the newest migration."""
    database = Database(get_settings().resolved_database_url)
    database.migrate()
    return database
