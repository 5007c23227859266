"""Whether some answer surely fits, by the bytes of the first rows."""

import json
from pathlib import Path
from typing import Any

from services.training.learnable import some_answer_fits


def test_the_calls_of_earlier_turns_count_too(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x" * 200}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Nothing."},
        {"role": "assistant", "content": "There is nothing."},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    assert some_answer_fits(rows, "assistant", 64)
    assert not some_answer_fits(rows, "last_assistant", 64)
    assert some_answer_fits(rows, "last_assistant", 512)
