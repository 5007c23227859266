"""Takes the commands that come while answers are written: more answers join, and adapters come and go."""

from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from domain import protocol
from engine.answer import Answer
from engine.base import Base
from engine.channel import Channel
from engine.heap import give_back
from engine.row_check import RowFacts
from engine.together import Together, Told

_WORTH_GIVING_BACK_BYTES = 64 * 2**20


class _Turn(Enum):
    """What has become of a command that is looked at."""

    SERVED = auto()
    WAITS = auto()  # what does not touch it may pass
    ALONE = auto()  # for the base to be free: nothing may pass


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
        waiting: list[protocol.AnyCommand] = []
        turn = _Turn.SERVED
        while commands and turn is not _Turn.ALONE:
            command = commands.popleft()
            turn = self._serve_now(command, waiting)
            if turn is not _Turn.SERVED:
                waiting.append(command)
        commands.extendleft(reversed(waiting))
        return turn is _Turn.ALONE

    def _serve_now(self, command: protocol.AnyCommand, before: list[protocol.AnyCommand]) -> _Turn:
        """Serve a command if its turn has come.

        Args:
            before: Those that came earlier and wait.
        """
        if isinstance(command, protocol.Generate):
            return _Turn.WAITS if self._is_held_up(command, before) else self._join(command)
        if not isinstance(command, protocol.AttachAdapter | protocol.DetachAdapter):
            return _Turn.ALONE
        if self._is_wanted(command, before):
            return _Turn.WAITS
        self._together.release()
        self._serve(command)
        self._base.backend.begin_answering(self._base.model)
        return _Turn.SERVED

    def _is_held_up(self, command: protocol.Generate, before: list[protocol.AnyCommand]) -> bool:
        """Tell whether an answer has to wait: its adapter is to be taken off first, or another waits for room."""
        if _leaves(command.adapter_id, before):
            return True
        waits_for_room = any(other.request_id in self._prepared for other in before)
        return waits_for_room and not self._channel.stop_requested(command.request_id)

    def _is_wanted(
        self, command: protocol.AttachAdapter | protocol.DetachAdapter, before: list[protocol.AnyCommand]
    ) -> bool:
        """Tell whether an adapter has to stay as it is for now: an answer uses it, or it is to be taken off first."""
        if isinstance(command, protocol.AttachAdapter):
            return _leaves(command.adapter_id, before)
        answers = (other for other in before if isinstance(other, protocol.Generate))
        return self._together.uses(command.adapter_id) or command.adapter_id in {one.adapter_id for one in answers}

    def _join(self, command: protocol.Generate) -> _Turn:
        """Begin an answer, or refuse it, which ends it too; it waits if there is no room for it yet."""
        turn = _Turn.SERVED
        with self._told(command.request_id):
            prepared = self._prepared.pop(command.request_id, None)
            self._channel.check_stop(command.request_id)
            answer = prepared or Answer(self._base, command, self._channel)
            if not self._together.suits(answer):
                turn = _Turn.ALONE
            elif self._together.has_room(answer):
                self._together.add(answer)
            else:
                self._prepared[command.request_id] = answer
                turn = _Turn.WAITS
        return turn

    def _done(self, answer: Answer) -> None:
        result = answer.finish().model_dump(mode="json")
        self._channel.emit(protocol.Done(request_id=answer.command.request_id, result=result))


def _leaves(adapter_id: str | None, before: list[protocol.AnyCommand]) -> bool:
    """Tell whether an adapter waits to be taken off."""
    return any(isinstance(other, protocol.DetachAdapter) and other.adapter_id == adapter_id for other in before)
