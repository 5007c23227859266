"""What models are made of is asked of an engine once, and kept."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from core.errors import EngineUnavailable
from domain.results import Described
from services.engines.process import EngineProcess
from services.models.embedded import CONFIG
from services.models.embedded_shape import EMBEDDED_SHAPE
from services.models.shapes import ModelShapes, shape_cache, shape_key
from tests.support.server import StudioServer, wait_until
from tests.support.shapes import shape_of
from tests.support.tiny_model import TINY_ID

_KEPT = TypeAdapter(Described)
SMALL = {**CONFIG, "num_hidden_layers": 2, "vocab_size": 100}


class Engines:
    """Starts engines and remembers them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[EngineProcess] = []

    def start(self) -> EngineProcess:
        self.started.append(EngineProcess(self.folder / "shapes.log", backend="none"))
        return self.started[-1]


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    engines = Engines(tmp_path)
    yield engines
    for engine in engines.started:
        engine.kill()
        engine.close()


def _shapes(engines: Engines, **changes: Any) -> ModelShapes:
    return ModelShapes(shape_cache(engines.folder), engines.start, **changes)


@pytest.mark.engine
def test_a_model_is_described_once_and_by_any_server_that_shares_the_cache(engines: Engines) -> None:
    shapes = _shapes(engines)
    said = shapes.describe(SMALL)
    assert said.shape == shape_of(SMALL) and said.problem is None
    assert _shapes(engines).describe(SMALL) == shapes.describe(SMALL) == said
    assert _shapes(engines).known(SMALL) == said.shape
    assert len(engines.started) == 1
    shapes.close()
    assert not engines.started[0].alive


@pytest.mark.engine
def test_how_a_checkpoint_holds_its_weights_needs_no_new_description(engines: Engines) -> None:
    shapes = _shapes(engines)
    shapes.describe(SMALL)
    packed = shapes.describe({**SMALL, "quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float16"})
    assert packed.shape is not None and packed.shape.stored is not None and packed.shape.stored.bits == 8
    assert packed.shape.dtype == "float16"
    unknown = shapes.describe({**SMALL, "quantization_config": {"quant_method": "hqq"}})
    assert unknown.shape is None and unknown.problem is not None and "hqq" in unknown.problem
    assert len(engines.started) == 1
    shapes.close()


@pytest.mark.engine
def test_a_list_gets_what_is_known_and_the_rest_the_next_time(engines: Engines) -> None:
    shapes = _shapes(engines)
    assert shapes.known(SMALL) is None
    wait_until(lambda: shapes.known(SMALL) is not None)
    assert shapes.known(SMALL) == shape_of(SMALL)
    shapes.close()


@pytest.mark.engine
def test_a_killed_engine_is_said_not_kept_and_replaced(engines: Engines) -> None:
    shapes = _shapes(engines)
    shapes.describe(SMALL)
    deep = {**SMALL, "num_hidden_layers": 900}  # takes seconds
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(shapes.describe(deep)))
    asking.start()
    wait_until(lambda: engines.started[0].has_pending)
    engines.started[0].kill()
    asking.join()
    (said,) = answers
    assert said.shape is None and said.loadable and f"signal {signal.SIGKILL.value}" in said.problem
    assert shapes.describe({**SMALL, "num_hidden_layers": 3}).shape is not None
    assert len(engines.started) == 2
    shapes.close()


@pytest.mark.engine
def test_what_takes_too_long_is_ended_and_not_kept(engines: Engines) -> None:
    shapes = _shapes(engines, limit_s=0.0)
    said = shapes.describe(SMALL)
    assert said.shape is None and said.problem == "describing it took longer than 0 s of processor time"
    assert not engines.started[0].alive
    assert shape_cache(engines.folder).peek(shape_key(SMALL), _KEPT, lambda _: None) is None
    shapes.close()


@pytest.mark.engine
def test_an_engine_that_gets_no_processor_time_is_waited_for(engines: Engines) -> None:
    shapes = _shapes(engines)
    assert shapes.describe(SMALL).shape is not None
    shapes._limit_s = 3.0
    os.kill(engines.started[0].pid, signal.SIGSTOP)
    begun = threading.Timer(1.5 * shapes._limit_s, os.kill, (engines.started[0].pid, signal.SIGCONT))
    begun.start()
    assert shapes.describe({**SMALL, "num_hidden_layers": 3}).shape is not None
    assert not begun.is_alive() and len(engines.started) == 1
    shapes.close()


@pytest.mark.engine
def test_an_engine_without_work_is_ended(engines: Engines) -> None:
    shapes = _shapes(engines, idle_s=0.2)
    shapes.describe(SMALL)
    wait_until(lambda: not engines.started[0].alive)
    assert shapes.describe({**SMALL, "num_hidden_layers": 3}).shape is not None
    shapes.close()


def test_without_an_engine_the_reason_is_said(tmp_path: Path) -> None:
    def fail() -> EngineProcess:
        raise EngineUnavailable("No engine process could be started: no memory")

    said = ModelShapes(shape_cache(tmp_path), fail).describe(SMALL)
    assert said.shape is None and said.problem is not None and "no memory" in said.problem


def test_the_embedded_model_needs_none(tmp_path: Path) -> None:
    def fail() -> EngineProcess:
        raise AssertionError("an engine was asked")

    shapes = ModelShapes(shape_cache(tmp_path), fail)
    assert shapes.describe(CONFIG) == EMBEDDED_SHAPE and shapes.known(CONFIG) == EMBEDDED_SHAPE.shape


@pytest.mark.engine
def test_a_model_that_no_class_loads_is_refused_everywhere_with_the_reason(
    studio: StudioServer, tmp_path: Path
) -> None:
    root = Path(studio._environment["PEFT_STUDIO_MODEL_DIRS"])
    folder = root / "tests" / "encoder"
    folder.mkdir()
    for file in (root / TINY_ID).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    judged = studio.http.post("/api/models/compatibility", json={"model_id": "tests/encoder"}).json()
    assert judged["verdict"] == "unknown" and any("encoder" in blocker for blocker in judged["blockers"])
    refused = studio.http.post("/api/peft/load-model", json={"model_id": "tests/encoder"})
    assert refused.status_code == 422 and "fill in masked words" in refused.json()["detail"]
