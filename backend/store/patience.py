"""Waiting for a database that is away: what must be recorded is tried again until it is, or the server ends."""

import threading
from collections.abc import Callable
from typing import TypeVar

from core.errors import DatabaseUnavailable, StorageFull

T = TypeVar("T")
# What a database that cannot be used for now raises.
AWAY = (DatabaseUnavailable, StorageFull)
_TRY_AGAIN_S = 1.0


class ServerEnds(Exception):
    """The server is told to stop while the database cannot be used: nothing more can be recorded."""


def patiently(use: Callable[[], T], closing: threading.Event) -> T:
    """Use the database, again and again until it answers.

    Args:
        use: May be called several times. A database that went away may have kept what it did not answer.
        closing: Set once the server is told to stop.

    Raises:
        ServerEnds: The server is told to stop first.
    """
    while True:
        try:
            return use()
        except AWAY:
            if closing.wait(_TRY_AGAIN_S):
                raise ServerEnds from None
