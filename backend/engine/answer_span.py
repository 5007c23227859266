"""The characters of an answer in a rendered conversation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Characters of a text, from `start` to before `end`.

    Attributes:
        cuts_start: Whether `start` may be inside a token. Two texts may begin to differ within a token. The token then
            belongs to the answer.
        cuts_end: The same for `end`. The token then does not belong to the answer.
    """

    start: int
    end: int
    cuts_start: bool = False
    cuts_end: bool = False
