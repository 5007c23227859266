"""The process's database, migrated when it is first used."""

from functools import cache

from core.settings import get_settings
from store.database import Database


@cache
def get_database() -> Database:
    """Return the database of the settings, at the newest migration."""
    database = Database(get_settings().resolved_database_url)
    database.migrate()
    return database
