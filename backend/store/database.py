"""One engine, migrations on start, and transactions that wait for each other instead of failing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from core.errors import StorageFull

_MIGRATIONS = Path(__file__).parent / "migrations"
# The newest migration. A database already there is opened without importing Alembic, which costs 0.1 s.
HEAD = "0002"


class Database:
    """The service's tables.

    Args:
        url: An SQLAlchemy URL. SQLite runs in WAL mode with synchronous=FULL: a commit that was acknowledged
            is on the disk.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        arguments: dict[str, Any] = {"timeout": 30} if url.startswith("sqlite") else {}
        database = make_url(url).database
        if url.startswith("sqlite") and database:
            Path(database).parent.mkdir(parents=True, exist_ok=True)
        self.engine: Engine = create_engine(url, connect_args=arguments, pool_pre_ping=not url.startswith("sqlite"))
        if url.startswith("sqlite"):
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_immediate)

    def migrate(self) -> None:
        """Bring the tables to the newest version."""
        if self.version() == HEAD:
            return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def version(self) -> str | None:
        """Return the migration the database is at, or None for an empty one."""
        with self.engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return found

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction; it commits at the end of the block.

        Raises:
            StorageFull: The database's disk has no space left; nothing was written.
        """
        try:
            with self.engine.begin() as connection:
                yield connection
        except OperationalError as error:
            if _says_full(error):
                raise StorageFull("No space is left on the device that holds the database.") from error
            raise

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _says_full(error: OperationalError) -> bool:
    # SQLite's own code, or PostgreSQL's SQLSTATE disk_full.
    original = error.orig
    return (
        getattr(original, "sqlite_errorname", None) == "SQLITE_FULL" or getattr(original, "sqlstate", None) == "53100"
    )


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event below starts transactions
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails at once when another wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
