"""One instance a process: `functools.cache` would let two threads that ask at once make two."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Singleton(Generic[T]):
    """A getter that makes its value at the first call and returns it ever after."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.RLock()
        self._made: tuple[T] | None = None
        self.__doc__ = make.__doc__
        self.__name__ = make.__name__

    def __call__(self) -> T:
        """Return the value, made now if this is the first call. Threads that come at once get the same one."""
        made = self._made
        if made is None:
            with self._lock:
                made = self._made = self._made or (self._make(),)
        return made[0]

    @property
    def made(self) -> T | None:
        """The value if it has been made; asking does not make it."""
        return self._made[0] if self._made is not None else None

    def clear(self) -> None:
        """Forget the value; the next call makes another."""
        with self._lock:
            self._made = None


def singleton(make: Callable[[], T]) -> Singleton[T]:
    """Decorate a function that makes the process's one instance of something."""
    return Singleton(make)
