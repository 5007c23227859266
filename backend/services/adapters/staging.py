"""Copies the files of an imported adapter: at most as many bytes as allowed, from its folder only, and no links."""

import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from core.errors import AdapterRejected, PathNotAllowed, TooLarge
from core.files import storage_errors
from domain.adapter_files import adapter_folder, check_names, is_litter, kept_files

_CHUNK_BYTES = 2**20
_MAX_ENTRIES = 10_000
# zipfile reads a whole directory at once and takes ten times its size. A directory of 10,000 files has 1 MiB.
_MAX_DIRECTORY_BYTES = 4 * 2**20
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_END, _END_BYTES, _ZIP64_LOCATOR, _LOCATOR_BYTES = b"PK\x05\x06", 22, b"PK\x06\x07", 20


def allowed_folder(path: str, roots: Sequence[Path]) -> Path:
    """Return a folder below one of the roots.

    Raises:
        PathNotAllowed: It leads elsewhere. The error does not say whether anything is there.
        AdapterRejected: There is no folder of that name.
    """
    try:
        folder = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterRejected(f"{path!r:.200} is no path.") from error
    # Compared part by part, since as a text /data-evil begins with /data.
    if not Path(path).is_absolute() or not any(folder.is_relative_to(root.resolve()) for root in roots):
        raise PathNotAllowed(
            f"{path!r:.200} is not below a folder that adapters may come from: the data directory, or one of "
            "PEFT_STUDIO_MODEL_DIRS."
        )
    if not folder.is_dir():
        raise AdapterRejected(f"There is no folder {path!r:.200}.")
    return folder


def copy_folder(source: Path, target: Path, max_bytes: int, roots: Sequence[Path] = ()) -> None:
    """Copy an adapter's files out of a folder. They are at its top, or in the only folder with an adapter.

    Args:
        source: The folder.
        target: Where they go.
        max_bytes: The most bytes of all files together.
        roots: Links in the folder may lead into it, or into these folders.

    Raises:
        PathNotAllowed: A link leads out of the folder.
        NoSafeWeights, AdapterRejected: As `check_names` says.
        TooLarge, StorageFull: There is no room for them.
    """
    inside = [root.resolve() for root in (source, *roots)]
    where = f"The folder {source.name}"
    names = [name for name in _walk(source, inside) if not is_litter(name)]
    top = adapter_folder(where, names)
    inner = [name.removeprefix(top) for name in names if name.startswith(top)]
    check_names(where, inner, [name for name in names if not name.startswith(top)])
    left = max_bytes
    for name in kept_files(inner):
        with _open_plain(source / top / name, inside) as file:
            left = _copy(file, target / name, left, max_bytes)


def _walk(source: Path, inside: list[Path]) -> Iterator[str]:
    """Yield the names of all files below a folder.

    Raises:
        PathNotAllowed: A link leads out of it.
        AdapterRejected: There are more than an adapter has.
    """
    count = 0
    for parent, folders, files in os.walk(source):  # does not follow links to folders
        for name in (*folders, *files):
            path = Path(parent) / name
            count += 1
            if count > _MAX_ENTRIES:
                raise AdapterRejected(f"The folder {source.name} has more than {_MAX_ENTRIES} entries.")
            _check_inside(path, inside)
            if name in files:
                yield path.relative_to(source).as_posix()


def _check_inside(path: Path, inside: list[Path]) -> None:
    if not any(path.resolve().is_relative_to(root) for root in inside):
        raise PathNotAllowed(f"{path.name!r:.100} is a link out of its folder.")


def _open_plain(path: Path, inside: list[Path]) -> IO[bytes]:
    """Open a plain file. A pipe or a device, which could hang or never end, is refused."""
    _check_inside(path, inside)
    descriptor = os.open(path.resolve(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterRejected(f"{path.name} is no plain file.")
    return os.fdopen(descriptor, "rb")


def unzip(archive: Path, target: Path, max_bytes: int) -> None:
    """Unpack an adapter's files. They are at the top of the zip, or in the only folder with an adapter.

    Raises:
        AdapterRejected: It is broken, is packed in an unknown way, or names a path outside of it.
        NoSafeWeights, AdapterRejected: As `check_names` says.
        TooLarge, StorageFull: Its content is too large, whatever size the zip names.
    """
    _check_directory(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            everything = _members(opened.infolist())
            top = adapter_folder("The zip", everything)
            members = {name.removeprefix(top): info for name, info in everything.items() if name.startswith(top)}
            check_names("The zip", members, [name for name in everything if not name.startswith(top)])
            left = max_bytes
            kept = kept_files(members)
            if sum(members[name].file_size for name in kept) > max_bytes:
                raise TooLarge(f"The adapter in the zip is larger than {max_bytes} bytes.")
            for name in kept:
                with opened.open(members[name]) as file:
                    left = _copy(file, target / name, left, max_bytes)
    except (*_BROKEN, NotImplementedError, EOFError, OverflowError, UnicodeDecodeError) as error:
        raise AdapterRejected(f"The zip cannot be read: {error}.") from error
    except RuntimeError as error:  # zipfile's for an encrypted member
        raise AdapterRejected("The zip is encrypted.") from error
    except OSError as error:
        if error.errno is None:  # a decompressor's
            raise AdapterRejected(f"The zip cannot be read: {error}.") from error
        raise


def _check_directory(archive: Path) -> None:
    """Refuse a zip with a directory that would fill the memory, before zipfile reads it.

    Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.14 to 4.3.16.
    """
    with archive.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES - 2**16 - _LOCATOR_BYTES))
        tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + _END_BYTES:
        raise AdapterRejected("The file is no zip, or is cut off.")
    if tail[max(0, at - _LOCATOR_BYTES) : at].startswith(_ZIP64_LOCATOR):
        raise AdapterRejected("The zip is in the format for more than 65,535 files or 4 GiB; no adapter is that large.")
    if int.from_bytes(tail[at + 12 : at + 16], "little") > _MAX_DIRECTORY_BYTES:
        raise AdapterRejected("The zip lists more files than an adapter has.")


def _members(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the files of a zip by their path, without what operating systems leave beside people's files.

    Raises:
        AdapterRejected: A member is a link or a device, is there twice, or has a path that leads out of the zip.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    if len(infos) > _MAX_ENTRIES:
        raise AdapterRejected(f"The zip has more than {_MAX_ENTRIES} entries.")
    for info in infos:
        name, mode = info.filename, info.external_attr >> 16
        path = PurePosixPath(name)
        shown = name.removesuffix("\r") if is_litter(name) else name  # macOS has a file of such a name
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not shown.isprintable():
            raise AdapterRejected(f"The zip names the path {name!r:.100}, which leaves it.")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise AdapterRejected(f"{name!r:.100} in the zip is a link or a device.")
        if info.flag_bits & 0x1:
            raise AdapterRejected("The zip is encrypted.")
        if info.is_dir():
            continue
        if str(path) in members:
            raise AdapterRejected(f"{name!r:.100} is in the zip twice.")
        members[str(path)] = info
    return {name: info for name, info in members.items() if not is_litter(name)}


def _copy(source: IO[bytes], target: Path, left_bytes: int, max_bytes: int) -> int:
    """Copy a file; return how much of the limit is left.

    Raises:
        TooLarge: The file is larger than the limit.
        StorageFull: There is no room for it.
    """
    target.parent.mkdir(exist_ok=True)
    with storage_errors(target), target.open("xb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            left_bytes -= len(chunk)
            if left_bytes < 0:
                raise TooLarge(f"The adapter is larger than {max_bytes} bytes.")
            file.write(chunk)
    return left_bytes
