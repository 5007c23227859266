"""Makes the README's table of the server's variables from the settings themselves.

Without an option the table is compared with the settings, which is a part of `make check`.

Exit status:
    0: The table is as the settings are, or was written.
    1: It is not; the message says how to write it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "backend"))  # as the server's own modules find each other

from pydantic.fields import FieldInfo  # noqa: E402

from core.environment import variable  # noqa: E402
from core.settings import Settings  # noqa: E402

README = ROOT / "README.md"
_BEGIN = "<!-- settings: written by scripts/settings_table.py --write -->\n"
_END = "<!-- settings: end -->\n"
_HEAD = "| variable | default | meaning |\n| --- | --- | --- |\n"
_GIB = 2**30


class NoPlace(Exception):
    """The text has no marks between which the table belongs."""


def table() -> str:
    """Return the table: a row for each setting, in the order that they are declared in."""
    rows = (
        f"| `{variable(name)}` | {_default(field)} | {field.description} |\n"
        for name, field in Settings.model_fields.items()
    )
    return _HEAD + "".join(rows)


def _default(field: FieldInfo) -> str:
    words = field.json_schema_extra
    if isinstance(words, dict) and "default_in_words" in words:
        return str(words["default_in_words"])
    value: Any = field.default
    if value is None or value == ():
        return "none"
    if isinstance(value, int) and value >= _GIB and value % _GIB == 0:
        return f"`{value}` ({value // _GIB} GiB)"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def with_table(text: str) -> str:
    """Return a text with the table between its marks.

    Raises:
        NoPlace: It has no such marks.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise NoPlace(f"the lines {_BEGIN.strip()} and {_END.strip()} are not both there")
    return "".join((before, begin, table(), end, after))


def main() -> int:
    """Compare or write the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into the README")
    parser.add_argument("--readme", type=Path, default=README, help="another file than README.md")
    arguments = parser.parse_args()
    text = arguments.readme.read_text(encoding="utf-8")
    try:
        wanted = with_table(text)
    except NoPlace as error:
        print(f"{arguments.readme}: {error}.", file=sys.stderr)
        return 1
    if arguments.write:
        arguments.readme.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print(
            f"{arguments.readme}: the table of variables is not that of the settings. "
            "Write it with: .venv/bin/python scripts/settings_table.py --write",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
