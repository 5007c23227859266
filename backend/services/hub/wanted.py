"""What is read of a repository of the Hub; models and adapters have theirs in their own rooms."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from domain.hub.tree import RepoFile, Selection


@dataclass(frozen=True)
class Part:
    """What a repository must have to be of use.

    Attributes:
        words: What it is, to be read by people.
        files: Takes names; returns its files among them, or nothing if they are not complete.
    """

    words: str
    files: Callable[[Iterable[str]], tuple[str, ...]]

    @classmethod
    def named(cls, name: str) -> "Part":
        """Return the part that is one file."""
        return cls(name, lambda names: (name,) if name in names else ())


@dataclass(frozen=True)
class Wanted:
    """What is fetched of a repository.

    Attributes:
        parts: What must be in a folder for it to be whole.
        choose: Takes the id and the tree; returns what is read of it, or refuses it.
        check: Takes the folder of the small files and the id; refuses it before its weights are fetched.
    """

    parts: tuple[Part, ...]
    choose: Callable[[str, Iterable[RepoFile]], Selection]
    check: Callable[[Path, str], None]

    def lacking(self, folder: Path) -> tuple[str, ...]:
        """Say which parts a folder is without: all of them if there is no folder."""
        return self.missing([path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else [])

    def missing(self, names: Sequence[str]) -> tuple[str, ...]:
        """Say which parts the files of a folder lack."""
        return tuple(part.words for part in self.parts if not part.files(names))
