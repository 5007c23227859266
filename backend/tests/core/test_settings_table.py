"""The README's table of variables is that of the settings."""

import subprocess
import sys
from pathlib import Path

from core.environment import variable
from core.settings import Settings
from tests.support.server import BACKEND

README = BACKEND.parent / "README.md"


def settings_table(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "scripts/settings_table.py", *arguments]
    return subprocess.run(command, cwd=README.parent, capture_output=True, text=True, timeout=60)


def test_the_readme_has_the_table_of_the_settings() -> None:
    done = settings_table()
    assert (done.returncode, done.stderr) == (0, "")


def test_each_setting_has_a_row_with_words() -> None:
    text = README.read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        assert text.count(f"\n| `{variable(name)}` |") == 1
        assert field.description


def test_a_changed_table_is_found_and_written_anew(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(
        text.replace("| `PEFT_STUDIO_PORT` | `8000` |", "| `PEFT_STUDIO_PORT` | `9000` |"), encoding="utf-8"
    )
    assert copy.read_text(encoding="utf-8") != text
    done = settings_table("--readme", str(copy))
    assert done.returncode == 1 and "settings_table.py --write" in done.stderr
    assert settings_table("--readme", str(copy), "--write").returncode == 0
    assert copy.read_text(encoding="utf-8") == text


def test_a_readme_without_a_place_for_the_table_is_left_alone(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text("# No table\n")
    assert settings_table("--readme", str(copy), "--write").returncode == 1
    assert copy.read_text() == "# No table\n"
