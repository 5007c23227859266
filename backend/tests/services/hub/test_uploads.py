"""What is written to the Hub has a time limit, and its failures are told as every other request's."""

import io
import time
from collections.abc import Iterator
from contextvars import copy_context

import pytest
from huggingface_hub.utils import close_session, get_session  # type: ignore[attr-defined]

from core.clock import SystemClock
from core.errors import AccessDenied, Conflict, HubUnavailable
from services.hub import http
from services.hub.http import HubHttp, limit_sessions, request_token
from services.hub.uploads import HubUploads
from tests.support.hub_double import HubDouble

# huggingface_hub 1.33 hands a file to httpx in a way that httpx would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def uploads(hub: HubDouble) -> HubUploads:
    return HubUploads(HubHttp(SystemClock(), time.sleep, endpoint=hub.url))


def commit(uploads: HubUploads, token: str = "hf_valid") -> str:
    def work() -> str:
        request_token.set(token)
        repo_id = uploads.make_repository("me/made", private=True)
        return uploads.commit(repo_id, {"a.txt": io.BytesIO(b"a")}, "A commit", lambda: None)

    return copy_context().run(work)


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(http, "_MAX_REQUEST_S", 0.3)
    limit_sessions.clear()
    yield
    monkeypatch.undo()
    limit_sessions.clear()
    limit_sessions()


@pytest.mark.usefixtures("short_limit")
def test_a_hub_that_hangs_at_the_commit_is_not_waited_for_for_ever(hub: HubDouble, uploads: HubUploads) -> None:
    hub.fail("commit", "hang")
    with pytest.raises(HubUnavailable, match="ReadTimeout"):
        commit(uploads)
    hub.release()


def test_a_session_that_takes_the_place_of_another_has_the_limit_too(hub: HubDouble, uploads: HubUploads) -> None:
    commit(uploads)
    first = get_session()
    close_session()  # as huggingface_hub does where a connection fails
    assert get_session() is not first
    assert get_session().timeout == first.timeout and first.timeout.read == 60.0


def test_the_token_and_the_refusals_are_those_of_every_request(hub: HubDouble, uploads: HubUploads) -> None:
    assert commit(uploads) and hub.files("me/made") == {"a.txt": b"a"}
    with pytest.raises(AccessDenied, match="refuses the token"):
        commit(uploads, "hf_revoked")


def test_what_the_caller_raises_before_the_commit_comes_back_as_it_is(hub: HubDouble, uploads: HubUploads) -> None:
    stop = Conflict("stopped")

    def refuse() -> None:
        raise stop

    def work() -> None:
        request_token.set("hf_valid")
        repo_id = uploads.make_repository("me/made", private=True)
        uploads.commit(repo_id, {"a.txt": io.BytesIO(b"a")}, "A commit", refuse)

    with pytest.raises(Conflict) as raised:
        copy_context().run(work)
    assert raised.value is stop and hub.requests["commit"] == 0
