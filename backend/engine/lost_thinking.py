"""Finds the thinking in answers that a model's chat template leaves out.

Many templates keep the thinking of the last answer alone (Qwen3), and some keep none (DeepSeek-R1). Thinking is what a
turn has as `reasoning_content`, or as a block in its content.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.rendering import ChatRenderer

# How models mark a block: Qwen3, DeepSeek-R1, Seed-OSS, Kimi-VL, Magistral, Command A Reasoning.
_NAMES = r"think|thinking|thought|reasoning|seed:think"
_BLOCKS = re.compile(
    rf"(?P<open><(?P<name>{_NAMES})>|\[THINK\]|◁think▷|<\|START_THINKING\|>)(?P<body>.*?)"
    r"(?P<close></(?P=name)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>)",
    re.DOTALL,
)
_CLOSE = "</think>"  # DeepSeek-R1's prompt opens the block, so its answers only close it


@dataclass(frozen=True)
class LostThinking:
    """Whether the thinking of an answer before the last one is left out, and that of the last one."""

    earlier: bool
    last: bool


def lost_thinking(renderer: ChatRenderer, number: int, row: Mapping[str, Any]) -> LostThinking:
    """Tell which thinking of a conversation the template leaves out.

    The conversation is rendered once, with a word of its own in place of each thought. A word that is missing is a
    thought that the template leaves out. A conversation without thinking is not rendered.

    Args:
        renderer: Has the template.
        number: The row's position in the dataset, from 0, for messages.
        row: `messages`, and `tools` if it has any.

    Raises:
        BadData: The template refuses the conversation.
    """
    messages = row["messages"]
    marker = _Marker(messages)
    marked = [marker.turn(index, turn) if turn["role"] == "assistant" else turn for index, turn in enumerate(messages)]
    if not marker.turns:
        return LostThinking(earlier=False, last=False)
    text = renderer.render(number, {**row, "messages": marked}, ()).text
    said = {int(found) for found in re.findall(f"{marker.word}([0-9]+)e", text)}
    lost = {turn for thought, turn in enumerate(marker.turns) if thought not in said}
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "assistant")
    return LostThinking(earlier=bool(lost - {last}), last=last in lost)


class _Marker:
    """Puts a word of its own in place of each thought. The words are in no turn.

    Attributes:
        word: How each of them begins.
        turns: The index of each thought's turn.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        said = [turn[name] for turn in messages for name in ("content", "reasoning_content") if turn.get(name)]
        longest = max((len(run) for text in said for run in re.findall("w+", text)), default=0)
        self.word = "w" * (longest + 1)
        self.turns: list[int] = []

    def turn(self, index: int, turn: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer with its thoughts replaced."""
        marked = dict(turn)
        if turn.get("reasoning_content"):
            marked["reasoning_content"] = self._next(index)
        content, blocks = _BLOCKS.subn(lambda block: self._replaced(index, block), turn["content"])
        before, close, answer = content.partition(_CLOSE)
        if not blocks and close and before.strip():
            content = f"{self._next(index)}{close}{answer}"
        marked["content"] = content
        return marked

    def _replaced(self, index: int, block: "re.Match[str]") -> str:
        if not block["body"].strip():
            return block[0]
        return f"{block['open']}{self._next(index)}{block['close']}"

    def _next(self, index: int) -> str:
        self.turns.append(index)
        return f"{self.word}{len(self.turns) - 1}e"
