"""Every setting that is sent over HTTP takes effect at the end of the chain, with every method and storage."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from domain.peft.algorithms import Algorithm
from domain.peft.config import PARAMETER_NAMES
from tests.support.drawn_settings import requests, ways
from tests.support.server import StudioServer
from tests.support.setting_checks import CHECKS
from tests.support.setting_run import train

pytestmark = pytest.mark.engine


def test_every_setting_has_a_check() -> None:
    assert set(CHECKS) == set(PARAMETER_NAMES)


def check_all(studio: StudioServer, path: Path, algorithm: Algorithm, overrides: dict[str, Any]) -> None:
    run = train(studio, path, algorithm, overrides)
    failures = []
    for check in dict.fromkeys(CHECKS.values()):
        try:
            check(run)
        except AssertionError as error:
            failures.append(f"{check.__name__}: {error}")
    assert not failures, "\n".join(failures)


RUNS = 4  # of each method

# Every example is a run: none is shrunk.
runs = settings(
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    deadline=None,
)


@pytest.mark.parametrize(("algorithm", "quantization"), ways())
def test_every_setting_arrives(studio: StudioServer, tiny_path: Path, algorithm: Algorithm, quantization: str) -> None:
    @seed(f"{algorithm} {quantization}")  # the same ones each time, others for each method
    @settings(runs, max_examples=RUNS // [method for method, _ in ways()].count(algorithm))
    @given(requests(algorithm, quantization))
    def arrives(request: tuple[Algorithm, dict[str, Any]]) -> None:
        check_all(studio, tiny_path, *request)

    arrives()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(runs, max_examples=100)
@given(st.sampled_from(ways()).flatmap(lambda way: requests(*way)))
def test_whatever_is_drawn_arrives(
    studio: StudioServer, tiny_path: Path, request_: tuple[Algorithm, dict[str, Any]]
) -> None:
    check_all(studio, tiny_path, *request_)
