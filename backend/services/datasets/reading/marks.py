"""Things in the text of a row that a person should know of before it is trained on."""

import re

# Marks that tokenizers read as one special token where they stand in plain text, and placeholders never filled in.
_MARKS = re.compile(rb"<\|[a-zA-Z_]{2,30}\|>|</?s>|\[/?INST\]|\{\{ ?[a-zA-Z_]{2,30} ?\}\}")


def find_marks(line: bytes) -> set[str]:
    """Return a note for each kind of mark in a row."""
    if b"<" not in line and b"{{" not in line and b"INST]" not in line:
        return set()
    return {
        f"hold {mark.decode()!r}, which looks like a placeholder that was never filled in"
        if mark.startswith(b"{{")
        else f"hold {mark.decode()!r}, which a tokenizer that knows it reads as a special token"
        for mark in _MARKS.findall(line)
    }
