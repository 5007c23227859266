"""A folder is whole or not there, whatever system call is the last."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.files import says_no_space, whole_folder
from core.manifest import NAME, FolderDamaged, read_manifest, verify, write_manifest
from tests.support.server import BACKEND

# Two checkpoints one after the other into the same place, as a run that is trained again writes them.
WRITER = """
import sys
from pathlib import Path
from core.files import whole_folder
from core.manifest import write_manifest
for step in (1, 2):
    with whole_folder(Path(sys.argv[1]) / "step") as folder:
        for name in ("adapter", "optimizer"):
            (folder / name).write_bytes(bytes([step]) * 100_000)
        write_manifest(folder, {"step": step})
    print("written", step, flush=True)
"""
CALLS = ("mkdir", "write", "fsync", "rename", "unlinkat", "rmdir")


def traced(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the writer under strace."""
    command = ["strace", "-f", "-qq", "-o", str(folder / "trace"), *options]
    return subprocess.run(
        [*command, sys.executable, "-B", "-c", WRITER, str(folder)], cwd=BACKEND, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often the writer makes each system call."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("count")
    if traced(folder, f"--trace={','.join(CALLS)}").returncode != 0:
        pytest.skip("strace may not trace here")
    lines = (folder / "trace").read_text().splitlines()
    return {name: sum(f" {name}(" in line for line in lines) for name in CALLS}


def acknowledged(done: "subprocess.CompletedProcess[str]") -> int:
    """Return the last step that the writer was told is on the disk."""
    return len(done.stdout.splitlines())


@pytest.mark.parametrize("call", CALLS)
def test_killed_at_each_system_call_the_folder_is_the_old_or_the_new_one(
    calls: dict[str, int], tmp_path: Path, call: str
) -> None:
    assert calls[call] > 0
    for when in range(1, calls[call] + 1):
        folder = tmp_path / str(when)
        folder.mkdir()
        done = traced(folder, f"--trace={call}", f"--inject={call}:signal=KILL:when={when}")
        assert done.returncode != 0
        found = [verify(path)["step"] for path in folder.glob("step")]
        told = acknowledged(done)
        # Between the two renames there is none, only the old one aside: another checkpoint of the run serves then.
        assert found in ([told], [told + 1]) or (found == [] and (told == 0 or call == "rename")), (call, when)


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO"])
@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
def test_an_error_of_each_system_call_leaves_no_part_behind(
    calls: dict[str, int], tmp_path: Path, call: str, error: str
) -> None:
    for when in range(1, calls[call] + 1):
        folder = tmp_path / str(when)
        folder.mkdir()
        done = traced(folder, f"--trace={call}", f"--inject={call}:error={error}:when={when}")
        if "in whole_folder" not in done.stderr:
            continue  # the writer's own print
        assert ("StorageFull" in done.stderr) == (error != "EIO"), done.stderr
        assert not list(folder.glob(".*"))
        assert all(verify(path) for path in folder.glob("step"))


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"some content")
    (folder / "b").write_bytes(b"")
    write_manifest(folder, {"step": 7})
    return folder


def test_a_manifest_says_what_it_was_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "whole")
    assert verify(folder) == read_manifest(folder) == {"step": 7}


@given(name=st.sampled_from(["a", NAME]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, name: str, place: float, bit: int) -> None:
    folder = make(tmp_path_factory.mktemp("flipped") / "folder")
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    try:
        about = verify(folder)
    except FolderDamaged:
        return
    # What JSON does not tell apart: a space of the indentation that became another white space.
    assert name == NAME and about == {"step": 7}


@pytest.mark.parametrize("damage", ["missing", "additional", "link", "folder"])
def test_what_is_missing_or_does_not_belong_is_named(tmp_path: Path, damage: str) -> None:
    folder = make(tmp_path / "folder")
    if damage == "additional":
        (folder / "c").touch()
    else:
        (folder / "a").unlink()
    if damage == "link":
        (folder / "a").symlink_to(tmp_path / "folder" / "b")
    if damage == "folder":
        (folder / "a").mkdir()
    with pytest.raises(FolderDamaged, match=r"\b[ac] "):
        verify(folder)


def test_an_error_in_the_block_leaves_what_was_there(tmp_path: Path) -> None:
    target = make(tmp_path / "folder")
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert verify(target) and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (OSError(5, "Input/output error"), False),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (ValueError("os error 28"), False),
    ],
)
def test_no_space_is_told_from_other_errors(error: Exception, says: bool) -> None:
    assert says_no_space(error) == says
