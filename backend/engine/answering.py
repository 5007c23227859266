"""Takes the commands that come while answers are written: more answers join, and adapters come and go."""

from collections import deque
from collections.abc import Callable

from domain import protocol
from engine.answer import Answer
from engine.base import Base
from engine.channel import Channel
from engine.heap import give_back
from engine.row_check import RowFacts
from engine.together import Together, Told

_WORTH_GIVING_BACK_BYTES = 64 * 2**20


class Answering:
    """Serves answers, with all that may come between them, until a command needs the base for itself.

    Commands are served in the order in which they came, as far as they touch one another: an adapter is taken off when
    the answers that use it are written, an answer that has no room yet lets adapters pass but no other answer, and a
    command that changes the base or needs it for long waits for every answer before it, and holds up all that follow.

    Args:
        facts: That the base's rows can be computed together.
        serve: Carries out a command by itself.
        told: Reports the end of a command, if what happens within raises.
    """

    def __init__(
        self,
        base: Base,
        channel: Channel,
        facts: RowFacts,
        serve: Callable[[protocol.AnyCommand], None],
        told: Told,
    ) -> None:
        self._base, self._channel, self._serve, self._told = base, channel, serve, told
        self._together = Together(base, facts, told, self._done)
        self._prepared: dict[str, Answer] = {}  # of answers that wait

    def run(self, commands: deque[protocol.AnyCommand]) -> None:
        """Serve commands until none is there and no answer is being written, or one needs the base for itself.

        Args:
            commands: Those that are there already. What is not served stays in it, in its order.
        """
        self._base.backend.begin_answering(self._base.model)
        try:
            while True:
                commands.extend(self._channel.waiting_commands())
                alone = self._take(commands)
                if self._together.busy:
                    self._together.advance()
                elif alone or not commands:
                    return
        finally:
            self._together.release()
            if self._together.took_bytes > _WORTH_GIVING_BACK_BYTES:
                give_back()  # the next answers are admitted by what the system has free

    def _take(self, commands: deque[protocol.AnyCommand]) -> bool:
        """Serve what can be served now; return whether a command waits for the base to be free."""
        kept: list[protocol.AnyCommand] = []
        leaving: set[str] = set()  # adapters that wait to be taken off
        full, alone = False, False
        for command in list(commands):
            served = False
            if alone:
                pass
            elif isinstance(command, protocol.Generate):
                if command.adapter_id not in leaving and not (full and not self._stopped(command)):
                    joined = self._join(command)
                    served, full, alone = joined is not None and joined, full or joined is False, joined is None
            elif isinstance(command, protocol.AttachAdapter):
                served = command.adapter_id not in leaving
            elif isinstance(command, protocol.DetachAdapter):
                wanted = self._together.uses(command.adapter_id) or any(
                    isinstance(other, protocol.Generate) and other.adapter_id == command.adapter_id for other in kept
                )
                served = not wanted
                if wanted:
                    leaving.add(command.adapter_id)
            else:
                alone = True
            if served and not isinstance(command, protocol.Generate):
                self._together.release()
                self._serve(command)
                self._base.backend.begin_answering(self._base.model)
            if not served:
                kept.append(command)
        commands.clear()
        commands.extend(kept)
        return alone

    def _stopped(self, command: protocol.Generate) -> bool:
        return self._channel.stop_requested(command.request_id)

    def _join(self, command: protocol.Generate) -> bool | None:
        """Begin an answer, or refuse it.

        Returns:
            Whether that is done; False if there is no room yet, None if it has to be written by itself.
        """
        outcome: bool | None = True
        with self._told(command.request_id):
            prepared = self._prepared.pop(command.request_id, None)
            self._channel.check_stop(command.request_id)
            answer = prepared or Answer(self._base, command, self._channel)
            if not self._together.suits(answer):
                outcome = None
            elif self._together.has_room(answer):
                self._together.add(answer)
            else:
                self._prepared[command.request_id] = answer
                outcome = False
        return outcome

    def _done(self, answer: Answer) -> None:
        result = answer.finish().model_dump(mode="json")
        self._channel.emit(protocol.Done(request_id=answer.command.request_id, result=result))
