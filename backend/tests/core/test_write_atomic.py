"""A file is the old one or a whole new one, however many write it at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core.files import write_atomic


def test_threads_that_write_the_same_file_at_once_do_not_meet(tmp_path: Path) -> None:
    contents = [bytes([number]) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(write_atomic, tmp_path / "file", content) for content in contents * 10]
        for one in written:
            one.result()
    assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
