"""A table of states and the only changes between them."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Generic, TypeVar

S = TypeVar("S", bound=StrEnum)


class Transitions(Generic[S]):
    """The changes that one kind of job may go through.

    Args:
        table: For each state, those that may follow.

    Attributes:
        final: The states that nothing follows.
    """

    def __init__(self, table: Mapping[S, frozenset[S]]) -> None:
        self.table: Mapping[S, frozenset[S]] = MappingProxyType(dict(table))
        self.final = frozenset(state for state, following in table.items() if not following)

    def allow(self, current: S, following: S) -> bool:
        """Tell whether a job may go from one state to another."""
        return following in self.table[current]
