"""The unmodified `openai` package on the server of each module."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.support.openai_clients import client_of
from tests.support.server import StudioServer


@pytest.fixture(scope="module")
def client(studio: StudioServer) -> Iterator[OpenAI]:
    """A client of the module's server."""
    with client_of(studio) as made:
        yield made
