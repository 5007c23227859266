"""How many answers a base takes, and what is said of one more."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from api.problems import status_of
from core.errors import Unavailable
from domain.peft.algorithms import Algorithm
from services.adapter_service import AdapterService
from services.engines.process import CommandFailed
from services.generation_service import Generation, GenerationService, NoRoomToAnswer, TooManyAnswers
from services.peft_service import LoadRequest, PeftService
from store.database import Database
from tests.support.engine_double import SHORT_ANSWER, EngineDouble, EngineDoubles
from tests.support.little_memory import load


def refused(raised: "pytest.ExceptionInfo[Any]") -> bool:
    return status_of(raised.value) == 503 and raised.value.extras["retry_after_s"] > 0


def test_more_than_may_wait_are_refused_until_one_has_ended(
    peft: PeftService, engines: EngineDoubles, tmp_path: Path
) -> None:
    model = load(peft, LoadRequest("a/first", None, Algorithm.LORA, None, {}, "auto", "auto", force=False))
    adapters = AdapterService(Database(f"sqlite:///{tmp_path}/studio.db"), tmp_path / "adapters", peft)
    answering = GenerationService(peft, adapters, together=2, waiting=1)
    engines.started[0].takes_long = True
    three = [answering.start(model.id, SHORT_ANSWER) for _ in range(3)]
    with pytest.raises(TooManyAnswers) as raised:
        answering.start(model.id, SHORT_ANSWER)
    assert refused(raised)
    engines.started[0].answer()
    assert [generation.result().text for generation in three] == ["b"] * 3
    again = answering.start(model.id, SHORT_ANSWER)
    engines.started[0].kill()
    assert again.future.exception() is not None


def test_an_answer_without_room_may_be_asked_for_again() -> None:
    future: Future[Any] = Future()
    future.set_exception(CommandFailed("4 tokens take 8 bytes", error_class="no_room", suggestions=[]))
    with pytest.raises(NoRoomToAnswer) as raised:
        Generation(EngineDouble(None, 1), SHORT_ANSWER, future).result()
    assert isinstance(raised.value, Unavailable) and refused(raised)
