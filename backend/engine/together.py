"""Answers that are written together: a step of the model makes the next token of all of them.

An answer joins when its prompt has been computed. That is done in pieces, so that the others go on meanwhile. It
leaves when it is over. What moves its logits, its random numbers and its end are its own (engine/token_choice.py,
engine/answer.py). Why it is built like this is in docs/decisions/0021-answers-together.md.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from transformers import DynamicCache

from engine.answer import Answer
from engine.base import Base
from engine.errors import NoRoom
from engine.frozen_weights import unwrapped
from engine.mixed_adapters import MixedAdapters, can_mix
from engine.row_cache import RowCache
from engine.row_check import RowFacts, RowPasses, states_of
from engine.token_choice import TokenChoice

# How long prompts may at least hold up the answers that are being written, at each of their tokens. They always may for
# as long as such a token takes, so that a newcomer has half of a slow machine, too. The pieces are as long as this
# allows. With nothing to hold up they are longer, and only bound what a pass takes for a moment.
_HOLD_UP_S = 0.15
_FIRST_PIECE, _LEAST_PIECE, _MOST_PIECE = 64, 16, 512
_SAFE = 0.9  # of the free memory; the rest is for what passes take for a moment
# Reports how the command of a request ends, if what happens within raises.
Told = Callable[[str], AbstractContextManager[None]]


class _Row:
    """An answer with what its pass through the model needs."""

    def __init__(self, answer: Answer, lane: str | None, choice: TokenChoice) -> None:
        self.answer, self.lane, self.choice = answer, lane, choice
        self.prompt: DynamicCache | None = DynamicCache()
        self.done = 0  # tokens of the prompt that are computed
        self.last = 0  # the newest token

    @property
    def id(self) -> str:
        return self.answer.command.request_id


class _Lane:
    """Rows that go through the model in one pass."""

    def __init__(self) -> None:
        self.rows: list[_Row] = []
        self.cache = RowCache()

    @property
    def most(self) -> int:
        return max(row.answer.longest for row in self.rows)


class Together:
    """The answers that are being written on one base.

    Plain adapters and the bare base share a pass. An adapter of another kind (DoRA, experts, trained embeddings) has
    passes of its own, for all of its answers.

    Args:
        base: No other command may change it until `release`.
        facts: That its rows can be computed together.
        told: Reports the end of a request whose part fails.
        done: Reports the end of a request that is over.
        clock: Seconds that only grow.

    Attributes:
        took_bytes: The most that keys and values have taken.
    """

    def __init__(
        self,
        base: Base,
        facts: RowFacts,
        told: Told,
        done: Callable[[Answer], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base, self._facts, self._told, self._done, self._clock = base, facts, told, done, clock
        self._bare = unwrapped(base.model)
        self._passes = RowPasses(base.model, base.device)
        self._filling: list[_Row] = []
        self._lanes: dict[str | None, _Lane] = {}
        self.took_bytes = 0
        self._tokens_per_s: float | None = None  # of the newest piece of a prompt
        self._step_s = 0.0  # what the newest token of every answer took
        self._oldest_is_next = False
        self._mixable: dict[str, bool] = {}
        self._mixed: MixedAdapters | None = None
        self._active: tuple[str | None, ...] | None = None
        self._held: tuple[str | None] | None = None  # the adapter that PEFT computes with
        self._context = ExitStack()

    @property
    def busy(self) -> bool:
        """Whether anything is being written."""
        return bool(self._filling or self._lanes)

    def uses(self, adapter_id: str) -> bool:
        """Tell whether an answer is being written with an adapter."""
        return any(row.answer.command.adapter_id == adapter_id for row in self._rows())

    def _rows(self) -> list[_Row]:
        return [*self._filling, *(row for lane in self._lanes.values() for row in lane.rows)]

    # Joining

    def suits(self, answer: Answer) -> bool:
        """Tell whether an answer can be computed beside others: one that is too long for the model's window cannot."""
        longest = self._facts.longest
        return longest is None or answer.longest <= longest

    def has_room(self, answer: Answer) -> bool:
        """Tell whether an answer can join now.

        Raises:
            NoRoom: Its keys and values will not fit into the memory that is free, even with no answer beside it.
        """
        rows, most = self._rows(), answer.longest
        free = answer.command.free_bytes
        if free is not None:
            of_token = self._facts.token_bytes
            held = sum(of_token * length for lane in self._lanes.values() for length in lane.cache.lengths)
            room = int(_SAFE * (free + held))
            if of_token * most > room:
                raise NoRoom(
                    f"{most} tokens take up to {of_token * most} bytes beside the model, and {room} can be had now",
                    ["ask for fewer tokens", "unload another model"],
                )
            if (
                rows and self._planned([*(row.answer for row in rows), answer]) + held > room
            ):  # what is held is there twice while it is moved
                return False
        return len(rows) < answer.command.most_together

    def _planned(self, answers: list[Answer]) -> int:
        """Return what answers will take at most: in each lane a power of two rows, all as long as its longest."""
        lanes: dict[str | None, list[int]] = {}
        for answer in answers:
            lanes.setdefault(self._lane_of(answer.command.adapter_id), []).append(answer.longest)
        return sum(
            self._facts.token_bytes * max(lengths) * 2 ** (len(lengths) - 1).bit_length() for lengths in lanes.values()
        )

    def add(self, answer: Answer) -> None:
        """Begin an answer. Its errors are reported as its command's."""
        request_id = answer.command.request_id
        with self._told(request_id), torch.no_grad():
            if answer.command.echo:
                self._compute_with((answer.command.adapter_id,))
            answer.begin(self._base)
            if answer.most == 0:
                self._done(answer)
                return
            choice = TokenChoice(self._bare, answer, self._base.device)
            self._filling.append(_Row(answer, self._lane_of(answer.command.adapter_id), choice))

    def _lane_of(self, adapter_id: str | None) -> str | None:
        if adapter_id is None:
            return None
        if adapter_id not in self._mixable:
            self._mixable[adapter_id] = can_mix(self._base.model, adapter_id)
        return None if self._mixable[adapter_id] else adapter_id

    # Going on

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def advance(self) -> None:
        """Compute some of the waiting prompts, and one more token of every answer that is being written."""
        self._end_the_stopped()
        self._fill()
        began_s = self._clock()
        for lane in list(self._lanes.values()):
            self._step(lane)
        self._step_s = self._clock() - began_s
        self.took_bytes = max(self.took_bytes, sum(lane.cache.size_bytes for lane in self._lanes.values()))
        self._lanes = {name: lane for name, lane in self._lanes.items() if lane.rows}
        if not self.busy:
            self.release()

    def release(self) -> None:
        """Let go of the base: another command may use it or put adapters on it, and `advance` goes on afterwards."""
        if self._mixed is not None:
            self._mixed.stop()
        self._mixed, self._active, self._held, self._mixable = None, None, None, {}
        self._context.close()

    def _compute_with(self, adapters: tuple[str | None, ...]) -> None:
        """Have the model compute with one adapter, or with one for each row; None is the base."""
        if adapters.count(adapters[0]) == len(adapters):
            adapters = adapters[:1]
        if adapters == self._active:
            return
        self._active = None
        if self._mixed is None:
            self._mixed = MixedAdapters(self._base.model)
        lane = self._lane_of(adapters[0])
        if self._held != (lane,):
            self._mixed.stop()
            self._held = None
            self._context.close()
            self._context.enter_context(self._base.using(lane))
            self._held = (lane,)
        if lane is None and any(adapters):
            coming = {row.answer.command.adapter_id for row in self._rows() if row.lane is None}
            self._mixed.use(adapters, {name for name in coming if name is not None})
        else:
            self._mixed.stop()
        self._active = adapters

    def _end_the_stopped(self) -> None:
        for row in list(self._filling):
            if row.answer.stopped:
                self._filling.remove(row)
                self._end(row)
        for lane in self._lanes.values():
            for index in reversed(range(len(lane.rows))):
                if lane.rows[index].answer.stopped:
                    self._end(self._take_out(lane, index))

    def _take_out(self, lane: _Lane, index: int) -> _Row:
        row = lane.rows[index]
        lane.cache.remove(index)
        lane.rows[index] = lane.rows[-1]
        lane.rows.pop()
        return row

    def _end(self, row: _Row) -> None:
        with self._told(row.id):
            self._done(row.answer)

    def _fill(self) -> None:
        """Compute pieces of prompts for as long as they may hold up the others."""
        began_s, hold_up_s = self._clock(), max(_HOLD_UP_S, self._step_s)
        while self._filling and self._clock() - began_s < hold_up_s:
            row, joined = self._next_to_fill(), False
            alive = False
            with self._told(row.id):
                joined = self._fill_piece(row, self._piece(hold_up_s) if self._lanes else _MOST_PIECE)
                alive = True
            if joined or not alive:
                self._filling.remove(row)
            if not self._lanes:
                return

    def _next_to_fill(self) -> _Row:
        """Return the prompt with the least left and the oldest one in turn.

        So a short prompt does not wait for the whole of a long one, and no prompt waits for ever.
        """
        self._oldest_is_next = not self._oldest_is_next
        return self._filling[0] if not self._oldest_is_next else min(self._filling, key=_left)

    def _piece(self, hold_up_s: float) -> int:
        """Return how many tokens of a prompt may be computed at once."""
        if self._tokens_per_s is None:
            return _FIRST_PIECE
        return min(_MOST_PIECE, max(_LEAST_PIECE, int(hold_up_s * self._tokens_per_s)))

    def _fill_piece(self, row: _Row, most: int) -> bool:
        """Compute a piece of a prompt. With the last one the answer gets its first token and joins the others.

        Returns:
            Whether the prompt is computed.
        """
        if row.prompt is None:
            raise RuntimeError("the prompt is computed already")
        self._compute_with((row.answer.command.adapter_id,))
        began_s, ids = self._clock(), row.answer.prompt_ids[row.done : row.done + most]
        logits = self._passes.prompt(ids, row.prompt)
        row.done += len(ids)
        if row.done < len(row.answer.prompt_ids):
            self._tokens_per_s = len(ids) / max(self._clock() - began_s, 1e-9)
            return False
        states, row.prompt = states_of(row.prompt), None
        if not self._take(row, row.choice.of(logits)):
            self._done(row.answer)
            return True
        lane = self._lanes.setdefault(row.lane, _Lane())
        lane.rows.append(row)
        try:
            lane.cache.add(states, lane.most)
        except BaseException:
            lane.rows.pop()
            if not lane.rows:
                del self._lanes[row.lane]
            raise
        return True

    def _step(self, lane: _Lane) -> None:
        """Make the next token of each row of a lane."""
        if not lane.rows:
            return
        try:
            lane.cache.prepare(lane.most)
            self._compute_with(tuple(row.answer.command.adapter_id for row in lane.rows))
            logits = self._passes.step(lane.cache, [row.last for row in lane.rows])
            likeliest = logits.argmax(dim=-1).tolist()
        except Exception as error:  # memory that is gone, for example: the newest answer gives way
            row = self._take_out(lane, len(lane.rows) - 1)
            with self._told(row.id):
                raise error
            return
        for index in reversed(range(len(lane.rows))):
            row, over = lane.rows[index], True
            with self._told(row.id):
                token = likeliest[index] if row.choice.plain else row.choice.of(logits[index : index + 1])
                over = not self._take(row, token)
                if over:
                    self._done(row.answer)
            if over:
                self._take_out(lane, index)

    def _take(self, row: _Row, token: int) -> bool:
        """Add a token to an answer; return whether it goes on."""
        row.last = token
        row.answer.add([token])
        over = token in row.choice.ends or row.answer.stopped or row.answer.complete(row.choice.ids)
        return not (over or row.answer.count >= row.answer.most)


def _left(row: _Row) -> int:
    """Return how many tokens of a prompt are to be computed."""
    return len(row.answer.prompt_ids) - row.done
