"""Things in the text of a row that a person should know of before it is trained on."""

import re

# Marks that tokenizers read as one special token where they stand in plain text, and placeholders never filled in.
_MARKS = re.compile(r"<\|[a-zA-Z_]{2,30}\|>|</?s>|\[/?INST\]|\{\{ ?[a-zA-Z_]{2,30} ?\}\}")


def find_marks(line: str) -> set[str]:
    """Return a note for each kind of mark in a row."""
    if "<" not in line and "{{" not in line and "INST]" not in line:
        return set()
    return {
        f"hold {mark!r}, which looks like a placeholder that was never filled in"
        if mark.startswith("{{")
        else f"hold {mark!r}, which a tokenizer that knows it reads as a special token"
        for mark in _MARKS.findall(line)
    }
