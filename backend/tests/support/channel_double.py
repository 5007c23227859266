"""The engine's end of the pipes without pipes: a test reads what a command has sent."""

from typing import Any

from pydantic import BaseModel

from engine.channel import Channel


class RecordingChannel(Channel):
    """Keeps the events of a command that nobody stops."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def emit(self, event: BaseModel) -> None:
        self.events.append(event)

    def check_stop(self, request_id: str) -> None:
        pass

    def take_checkpoint_request(self, request_id: str) -> bool:
        return False
