"""The scripts and styles of the pages: read once, compressed once, under an address that changes with them."""

import gzip
import hashlib
import mimetypes
import threading
from dataclasses import dataclass
from pathlib import Path

from core.singleton import singleton

FOLDER = Path(__file__).parent / "static"
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Asset:
    """A file as it is sent.

    Attributes:
        compressed: The content under gzip.
        etag: Of the content, in quotes.
    """

    content: bytes
    compressed: bytes
    media_type: str
    etag: str


class Assets:
    """The files below a folder.

    Args:
        folder: Read now. A file that is put there later is not seen.

    Attributes:
        version: A digest of all files. It stands in their addresses, so that a browser may keep each for ever.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._ready: dict[str, Asset] = {}
        self._contents = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha256()
        for name, content in self._contents.items():
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        self.version = digest.hexdigest()[:12]

    def url(self, name: str) -> str:
        """Return the address of a file.

        Raises:
            KeyError: There is no such file.
        """
        if name not in self._contents:
            raise KeyError(f"no file {name} below static/")
        return f"/static/{self.version}/{name}"

    def get(self, name: str) -> Asset | None:
        """Return a file, compressed at its first use; None if there is none of this name."""
        if name not in self._contents:
            return None
        with self._lock:
            if name not in self._ready:
                content = self._contents[name]
                kind = _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "text/plain; charset=utf-8"
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                self._ready[name] = Asset(content, gzip.compress(content, 9, mtime=0), kind, etag)
            return self._ready[name]


@singleton
def get_assets() -> Assets:
    """Return the files of the pages."""
    return Assets(FOLDER)
