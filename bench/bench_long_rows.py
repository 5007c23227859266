"""The time to find all answers of a conversation: one by one in the whole, over in windows of it.

Both are measured in turn in one process, and must find the same. The template is that of the embedded model.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from engine.guards import hide_broken_torchvision

hide_broken_torchvision()

from engine.answer_windows import spans_by_windows
from engine.rendering import ChatRenderer, _Chat, _Shape
from engine.transformers_backend import load_tokenizer
from services.models.embedded import EmbeddedModel

TURNS, ROUNDS = 200, 5


def main() -> None:
    """Print the ratio of the old way's time to the new one's."""
    with tempfile.TemporaryDirectory() as logs:
        path = EmbeddedModel(ROOT / ".cache", Path(logs)).prepare(lambda stage, fraction: None)
    tokenizer = load_tokenizer(path)
    messages = [
        {"role": ("user", "assistant")[at % 2], "content": f"What is said in turn {at}."} for at in range(TURNS)
    ]
    answers = list(range(1, TURNS, 2))
    chat = _Chat(tokenizer, 0, messages, None, _Shape())
    ratios = []
    for _ in range(ROUNDS):
        start = time.process_time()
        one_by_one = {index: chat.span(index) for index in answers}
        between = time.process_time()
        in_windows = spans_by_windows(chat, answers)
        ratios.append((between - start) / (time.process_time() - between))
        if in_windows != one_by_one:
            sys.exit("the two ways differ")
    if ChatRenderer(tokenizer).render(0, {"messages": messages}, answers).spans != one_by_one:
        sys.exit("a row's spans are others")
    print(f"{TURNS} turns: one by one takes {statistics.median(ratios):.1f} times as long as windows")


if __name__ == "__main__":
    main()
