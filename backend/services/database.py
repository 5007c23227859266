"""The process's database, migrated when it is first used."""

from core.settings import get_settings
from core.singleton import singleton
from store.database import Database


@singleton
def get_database() -> Database:
    """Return the database of the settings, at the newest migration."""
    database = Database(get_settings().resolved_database_url)
    database.migrate()
    return database
