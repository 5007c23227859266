"""Whether a model can learn anything from a dataset, by an analysis or by the dataset's first rows."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from core.errors import DatasetNotTrainable
from domain.results import DatasetFigures

# Findings that leave a row with nothing to learn.
_WHY_NOTHING = {
    "answer_lost": "the answer begins beyond it",
    "nothing_to_learn": "no token is learned",
    "refused": "the model's chat template refuses the conversation",
}
_LOOKED_AT = 1000  # rows; the first that fits ends the search
_TEMPLATE_TOKENS = 8  # that a template adds to a turn: its marks and its role


def require_learnable(dataset_id: str, max_seq_length: int, figures: DatasetFigures) -> None:
    """Refuse a dataset whose analysis found nothing to learn.

    Raises:
        DatasetNotTrainable: With the rows of each finding that says why.
    """
    if figures.epoch.rows:
        return
    reasons = [
        f"{_WHY_NOTHING[name]} (rows {', '.join(str(number + 1) for number in finding.examples)}"
        f"{', …' if finding.rows > len(finding.examples) else ''})"
        for name, finding in figures.findings
        if name in _WHY_NOTHING and finding.rows
    ]
    raise DatasetNotTrainable(
        f"Nothing would be learned from {dataset_id} with max_seq_length={max_seq_length}: {'; '.join(reasons)}. "
        f"POST /api/datasets/{dataset_id}/analyze says more.",
    )


def some_answer_fits(rows: Path, train_on: str, max_seq_length: int) -> bool:
    """Tell whether one of the first rows certainly has an answer that begins within a number of tokens.

    The count is an upper bound: a byte is counted as a token, and each turn has some tokens of the template. So a row
    that is too long by this count may still fit.
    """
    with rows.open("rb") as file:
        for line in islice(file, _LOOKED_AT):
            row = json.loads(line)
            if "text" in row or train_on == "all":
                return True
            turns = row["messages"] if "messages" in row else _longest_conversation(row)
            answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
            wanted = answers[-1:] if train_on == "last_assistant" else answers
            learned = next((at for at in wanted if turns[at].get("weight", 1) != 0), None)
            if learned is None:
                continue
            before = sum(map(_most_tokens, turns[:learned])) + _TEMPLATE_TOKENS
            before += len(json.dumps(row["tools"])) if row.get("tools") else 0
            if before < max_seq_length:
                return True
    return False


def _longest_conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a preference or a judged answer, with the longer answer. The prompt's are not learned."""
    prompt = [{**turn, "weight": 0} for turn in row["prompt"]]
    answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    return [*prompt, *max(answers, key=lambda answer: len(json.dumps(answer)))]


def _most_tokens(turn: dict[str, Any]) -> int:
    """Return the most tokens that a turn may take: its text, its reasoning and the calls it makes."""
    said = [value for name, value in turn.items() if name not in ("role", "weight")]
    return sum(len(part.encode() if isinstance(part, str) else json.dumps(part)) for part in said) + _TEMPLATE_TOKENS
