"""Training rows in the shapes that clients send."""

import json


def messages_jsonl(count: int = 24) -> str:
    """Rows whose answer is a function of the question, so that there is something to learn."""
    turns = [
        [
            {"role": "user", "content": f"say {number % 7} twice"},
            {"role": "assistant", "content": f"{number % 7} {number % 7} number {number}"},
        ]
        for number in range(count)
    ]
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)


def preference_jsonl(count: int = 16) -> str:
    """Pairs of answers: the better one counts up, the worse one does not. Some have turns before the question."""
    rows = []
    for number in range(count):
        earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
        asked = {"role": "user", "content": f"count from {number}"}
        rows.append(
            {
                "prompt": [*(earlier if number % 3 == 0 else []), asked],
                "chosen": [{"role": "assistant", "content": f"{number} {number + 1} {number + 2}" * (1 + number % 2)}],
                "rejected": [{"role": "assistant", "content": f"no {number}"}],
            }
        )
    return "".join(json.dumps(row) + "\n" for row in rows)


def judged_jsonl(count: int = 16) -> str:
    """Answers that are judged good or bad (KTO)."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"count from {number}"}],
            "completion": [{"role": "assistant", "content": f"{number} {number + 1}" if number % 3 else "I will not"}],
            "label": bool(number % 3),
        }
        for number in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
