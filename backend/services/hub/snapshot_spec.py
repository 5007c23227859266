"""Which files of a Hub repository make a snapshot. The specs of models and of adapters are in their own rooms."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from domain.hub.tree import RepoFile, Selection


@dataclass(frozen=True)
class Part:
    """One part that a repository must have to be of use.

    Attributes:
        words: The name of the part in messages to people.
        files: Takes file names. It returns those that make up the part, or nothing if one of them is missing.
    """

    words: str
    files: Callable[[Iterable[str]], tuple[str, ...]]

    @classmethod
    def named(cls, name: str) -> "Part":
        """Return the part that is one file."""
        return cls(name, lambda names: (name,) if name in names else ())


@dataclass(frozen=True)
class SnapshotSpec:
    """Which files of a repository are downloaded, and when a folder has them all.

    Attributes:
        parts: A folder is whole when it has each of these.
        choose: Takes the id and the tree. It returns the files to download, or refuses the repository.
        check: Takes the folder of the small files and the id. It refuses the repository before its weights are
            downloaded.
    """

    parts: tuple[Part, ...]
    choose: Callable[[str, Iterable[RepoFile]], Selection]
    check: Callable[[Path, str], None]

    def lacking(self, folder: Path) -> tuple[str, ...]:
        """Return the parts that a folder lacks. A folder that does not exist lacks them all."""
        return self.missing([path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else [])

    def missing(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the parts that a list of file names lacks."""
        return tuple(part.words for part in self.parts if not part.files(names))
