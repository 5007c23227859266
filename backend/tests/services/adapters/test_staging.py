"""Folders and zips from elsewhere: only an adapter's plain files are copied, and never more than allowed."""

import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from core.errors import AdapterRejected, NoSafeWeights, PathNotAllowed, TooLarge
from services.adapters.staging import allowed_folder, copy_folder, unzip
from tests.support.adapter_double import adapter_files, write_files, zip_of

LIMIT = 10 * 2**20


def unzipped(tmp_path: Path, content: bytes, limit: int = LIMIT) -> dict[str, bytes]:
    archive, target = tmp_path / "in.zip", tmp_path / "out"
    archive.write_bytes(content)
    target.mkdir()
    unzip(archive, target, limit)
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_a_folder_is_allowed_by_its_parts_and_not_by_its_letters(tmp_path: Path) -> None:
    data, evil = tmp_path / "data", tmp_path / "data-evil"
    (data / "a").mkdir(parents=True)
    evil.mkdir()
    (data / "out").symlink_to(evil)
    assert allowed_folder(str(data / "a"), [data]) == data / "a"
    outside = (
        evil,
        tmp_path / "none",
        data / "out",
        data / ".." / "data-evil",
        Path("/etc"),
        data / "a/../../data-evil",
    )
    for path in outside:
        with pytest.raises(PathNotAllowed):
            allowed_folder(str(path), [data])
    for relative in ("data/a", "a", "..", "~", "%2e%2e", "..\\"):
        with pytest.raises(PathNotAllowed):
            allowed_folder(relative, [data])
    for missing in (f"{data}/none", f"{data}/\0"):
        with pytest.raises(AdapterRejected):
            allowed_folder(missing, [data])


def test_only_an_adapters_files_are_copied(tmp_path: Path) -> None:
    files = adapter_files() | {"modeling.py": b"evil", "notes/x.txt": b"x", "events.out.tfevents": b"log"}
    target = tmp_path / "out"
    target.mkdir()
    copy_folder(write_files(tmp_path / "in", files), target, LIMIT)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == adapter_files()
    with pytest.raises(TooLarge):
        copy_folder(tmp_path / "in", write_files(tmp_path / "again", {"x": b""}), 100)


def test_links_may_stay_inside_and_not_leave(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", adapter_files())
    (source / "README.md").unlink()
    (source / "README.md").symlink_to("adapter_config.json")
    target = tmp_path / "out"
    target.mkdir()
    copy_folder(source, target, LIMIT)
    assert not (target / "README.md").is_symlink()
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    for name in ("tokenizer.json", "sub/deep", "harmless.txt"):
        link = source / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(secret)
        with pytest.raises(PathNotAllowed, match="link out"):
            copy_folder(source, tmp_path / "never", LIMIT)
        link.unlink()
    (source / "folder").symlink_to(tmp_path)
    with pytest.raises(PathNotAllowed):
        copy_folder(source, tmp_path / "never", LIMIT)


def test_a_pipe_in_the_folder_does_not_hang(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", adapter_files())
    (source / "README.md").unlink()
    os.mkfifo(source / "README.md")
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterRejected, match="plain file"):
        copy_folder(source, tmp_path / "out", LIMIT)


@pytest.mark.parametrize("prefix", ["", "my-adapter/"])
def test_a_zip_is_read_at_its_top_or_in_its_one_folder(tmp_path: Path, prefix: str) -> None:
    assert unzipped(tmp_path, zip_of(adapter_files() | {"evil.py": b"x"}, prefix)) == adapter_files()


# Finder's "Compress": the folder itself, and for each file one of its attributes in a tree of their own.
FINDER = {
    "__MACOSX/my adapter/._adapter_config.json": b"\0\5\x16\7",
    "__MACOSX/._my adapter": b"\0\5\x16\7",
    "my adapter/.DS_Store": b"\0",
    ".DS_Store": b"\0",
}
LITTER: dict[str, tuple[str, dict[str, bytes]]] = {
    "Finder": ("my adapter/", FINDER),
    "Finder, the files alone": ("", {"__MACOSX/._adapter_config.json": b"x", "._README.md": b"x", ".DS_Store": b"x"}),
    "Finder, a folder with an icon": ("my adapter/", {"my adapter/Icon\r": b"", "__MACOSX/my adapter/._Icon\r": b"x"}),
    "attributes named like a pickle": ("a/", {"__MACOSX/a/._optimizer.pt": b"x", "a/._adapter_model.bin": b"x"}),
    "Explorer": ("my adapter/", {"my adapter/Thumbs.db": b"x", "desktop.ini": b"x"}),
    "two folders deep": ("export/my adapter/", {"export/notes.txt": b"x"}),
    "files beside the folder": (
        "my adapter/",
        {"README.md": b"another", "results.json": b"{}", "plots/loss.png": b"x"},
    ),
    "a run's checkpoints": (
        "out/",
        {"out/checkpoint-9/adapter_config.json": b"{}", "out/checkpoint-9/README.md": b"x"},
    ),
}


@pytest.mark.parametrize("kind", LITTER)
def test_what_systems_and_people_leave_beside_an_adapter_is_passed_over(tmp_path: Path, kind: str) -> None:
    prefix, litter = LITTER[kind]
    assert unzipped(tmp_path, zip_of(litter | {prefix + name: data for name, data in adapter_files().items()})) == (
        adapter_files()
    )


@pytest.mark.parametrize("kind", LITTER)
def test_a_folder_is_searched_as_a_zip_is(tmp_path: Path, kind: str) -> None:
    prefix, litter = LITTER[kind]
    source = write_files(tmp_path / "in", litter | {prefix + name: data for name, data in adapter_files().items()})
    (tmp_path / "out").mkdir()
    copy_folder(source, tmp_path / "out", LIMIT)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == adapter_files()


@pytest.mark.parametrize(
    "folders", [("a", "b"), ("runs/first", "runs/second"), ("a", "b/c"), ("out/checkpoint-1", "out/checkpoint-2")]
)
def test_several_adapters_are_refused_by_name(tmp_path: Path, folders: tuple[str, str]) -> None:
    files = {f"{folder}/{name}": data for folder in folders for name, data in adapter_files().items()}
    for take in (
        lambda: unzipped(tmp_path, zip_of(files | {"__MACOSX/c/adapter_config.json": b"x"})),
        lambda: copy_folder(write_files(tmp_path / "in", files), tmp_path / "never", LIMIT),
    ):
        with pytest.raises(AdapterRejected, match=f"2 adapters, in the folders {folders[0]}, {folders[1]};"):
            take()


def test_weights_of_another_folder_are_not_the_adapters(tmp_path: Path) -> None:
    split = {"a/adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "b/adapter_model.safetensors": b"x"}
    with pytest.raises(AdapterRejected, match=r"no adapter_model\.safetensors"):
        unzipped(tmp_path, zip_of(split))


def test_weights_of_mlx_are_told_from_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="as mlx-lm saves them"):
        unzipped(tmp_path, zip_of({"adapters.safetensors": b"x", "adapter_config.json": b"{}"}))


def member(name: str, **attributes: Any) -> bytes:
    """Return a sound adapter's zip with one more member, made as told."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for sound, content in adapter_files().items():
            archive.writestr(sound, content)
        info = zipfile.ZipInfo(name)
        for attribute, value in attributes.items():
            setattr(info, attribute, value)
        archive.writestr(info, b"/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (member("../../x"), "leaves it"),
        (member("/etc/x"), "leaves it"),
        (member("a/../../x"), "leaves it"),
        (member("..\\x"), "leaves it"),
        (member("C:x"), "leaves it"),
        (member("a\nb"), "leaves it"),
        (member("__MACOSX/../../x"), "leaves it"),
        (member("../.DS_Store"), "leaves it"),
        (member("/._x"), "leaves it"),
        (member("a\rb/Icon\r"), "leaves it"),
        (member("__MACOSX/._x", external_attr=0o120777 << 16), "link or a device"),
        (member("beside/optimizer.pt"), "optimizer.pt"),
        (member("tokenizer.json", external_attr=0o120777 << 16), "link or a device"),
        (member("tokenizer.json", external_attr=0o020666 << 16), "link or a device"),
        (member("tokenizer.json", external_attr=0o010666 << 16), "link or a device"),
        (member("optimizer.pt"), "optimizer.pt"),
        (member("sub/x.pkl"), "x.pkl"),
        (b"", "no zip"),
        (b"PK\x03\x04 and no more", "no zip"),
        (zip_of(adapter_files())[:-30], "no zip|cannot be read"),
        (zip_of({"readme": b""}), "adapter_config.json"),
        (b"\x1f\x8b\x08" + b"x" * 100, "no zip"),
    ],
)
def test_slips_links_devices_pickles_and_rubbish_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(AdapterRejected, match=words):
        unzipped(tmp_path, content)
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.zip", "out"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="twice"):
        unzipped(tmp_path, member("README.md"))


def test_a_pickle_only_zip_has_no_safe_weights(tmp_path: Path) -> None:
    with pytest.raises(NoSafeWeights):
        unzipped(tmp_path, zip_of({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}))


def test_an_encrypted_or_oddly_packed_zip_is_refused(tmp_path: Path) -> None:
    content = bytearray(zip_of(adapter_files()))
    directory = content.find(b"PK\x01\x02")
    encrypted = content.copy()
    encrypted[directory + 8] |= 1
    with pytest.raises(AdapterRejected, match="encrypted"):
        unzipped(tmp_path, bytes(encrypted))
    odd = content.copy()
    odd[directory + 10 : directory + 12] = (97).to_bytes(2, "little")
    (tmp_path / "out").rmdir()
    with pytest.raises(AdapterRejected, match="cannot be read"):
        unzipped(tmp_path, bytes(odd))


def test_a_bomb_is_stopped_at_the_limit_whatever_it_says(tmp_path: Path) -> None:
    bomb = zip_of(adapter_files() | {"tokenizer.json": bytes(200 * 2**20)})
    assert len(bomb) < 2**20
    with pytest.raises(TooLarge):
        unzipped(tmp_path, bomb)
    assert not list((tmp_path / "out").iterdir())

    # One that lies about its size: zipfile stops at the length that is told, and its sum then differs.
    lying = bytearray(bomb)
    at = lying.find(b"PK\x01\x02")
    while at >= 0:
        name = lying[at + 46 : at + 46 + int.from_bytes(lying[at + 28 : at + 30], "little")]
        if name == b"tokenizer.json":
            lying[at + 24 : at + 28] = struct.pack("<I", 1000)
        at = lying.find(b"PK\x01\x02", at + 4)
    (tmp_path / "out").rmdir()
    with pytest.raises((TooLarge, AdapterRejected)):
        unzipped(tmp_path, bytes(lying))
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= LIMIT


def test_a_directory_of_a_million_files_does_not_fill_the_memory(tmp_path: Path) -> None:
    entry = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * 1_000_000
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)
    (tmp_path / "in.zip").write_bytes(directory + end)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected, match="lists more files"):
            unzip(tmp_path / "in.zip", tmp_path, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    zip64 = directory[:1000] + b"PK\x06\x06" + bytes(52) + b"PK\x06\x07" + bytes(16) + end
    (tmp_path / "in.zip").write_bytes(zip64)
    with pytest.raises(AdapterRejected, match="4 GiB"):
        unzip(tmp_path / "in.zip", tmp_path, LIMIT)


def test_flipped_content_is_found(tmp_path: Path) -> None:
    content = bytearray(zip_of(adapter_files()))
    at = content.find(b"adapter_model.safetensors") + 40
    content[at] ^= 0xFF
    with pytest.raises(AdapterRejected, match="cannot be read"):
        unzipped(tmp_path, bytes(content))
