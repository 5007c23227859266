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
