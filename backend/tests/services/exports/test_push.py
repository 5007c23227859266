"""Pushes go to a double of the Hub through huggingface_hub; what it cannot take, and what stops them."""

import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any, cast

import pytest

from core.clock import SystemClock
from core.errors import AccessDenied, HubUnavailable, ModelRejected, StudioError
from domain.exports import PushedAdapter, PushSettings
from domain.jobs.export_states import ExportKind, ExportState
from services.exports.control import ExportControl, ExportStopped
from services.exports.push import HubPush
from services.hub.http import HubHttp, request_token
from services.hub.uploads import HubUploads, PushRejected
from store.records import AdapterRecord, ExportRecord
from tests.support.adapter_double import adapter_files, write_files
from tests.support.hub_double import HubDouble, ManualClock, quiet_environment
from tests.support.server import wait_until

# huggingface_hub 1.33 hands a file to httpx in a way that httpx would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class OneAdapter:
    """An adapter service with one adapter."""

    def __init__(self, path: Path) -> None:
        self.record = AdapterRecord(
            id="adp_1", name="mine", base_model_id="tests/tiny", base_revision=None, algorithm="lora", config=None,
            job_id=None, dataset_sha256=None, metrics={}, path=str(path), created_at="", version=3, source={},
        )  # fmt: skip

    def verified(self, _adapter_id: str) -> AdapterRecord:
        return self.record


class Bench:
    def __init__(self, hub: HubDouble, folder: Path) -> None:
        self.hub = hub
        self.adapters = OneAdapter(write_files(folder / "adp_1", adapter_files()))
        self.push = HubPush(cast(Any, self.adapters), HubUploads(HubHttp(SystemClock(), time.sleep, endpoint=hub.url)))
        self.control = ExportControl(ManualClock())
        self.stages: list[tuple[str, float | None]] = []
        report = self.control.report

        def note(stage: str, fraction: float | None) -> None:
            self.stages.append((stage, fraction))
            report(stage, fraction)

        self.control.report = note  # type: ignore[method-assign]

    def settings(self, **settings: Any) -> PushSettings:
        return PushSettings(**{"repo_id": "me/adapter", "private": True, "token": "request"} | settings)

    def run(self, token: str | None = "hf_valid", **settings: Any) -> PushedAdapter:
        record = ExportRecord(
            id="exp_1", sequence=1, adapter_id="adp_1", kind=ExportKind.PUSH, settings=self.settings(**settings),
            state=ExportState.RUNNING, cancel_request=False, attempts=1, history=[], result=None, error=None,
            created_at="", started_at=None, finished_at=None,
        )  # fmt: skip

        def work() -> PushedAdapter:
            request_token.set(token)
            return self.push.run(record, Path("unused"), self.control)

        return copy_context().run(work)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    quiet_environment(monkeypatch, tmp_path)
    with HubDouble() as hub:
        yield Bench(hub, tmp_path)


def test_an_adapter_is_one_commit_in_a_new_private_repository(bench: Bench) -> None:
    result = bench.run()
    assert bench.hub.files("me/adapter") == adapter_files()
    assert bench.hub.is_private("me/adapter")
    assert (result.repo_id, result.url) == ("me/adapter", f"{bench.hub.url}/me/adapter")
    assert bench.hub.commits("me/adapter") == 2  # the empty one that makes it, and this
    fractions = [fraction for stage, fraction in bench.stages if stage == "uploading" and fraction is not None]
    assert fractions == sorted(fractions) and 0 < fractions[0] < fractions[-1] <= 1
    assert bench.stages[0][0] == "making the repository" and bench.stages[-1][0] == "committing"
    assert all("Authorization" not in seen.headers for seen in bench.hub.seen if seen.route == "upload")

    again = bench.run()  # as after a server that ended before it could record the first
    assert again.commit == result.commit and bench.hub.commits("me/adapter") == 2


def test_a_repository_that_is_there_gets_a_commit_if_it_is_as_private(bench: Bench) -> None:
    bench.hub.add_model("me/adapter", {"old.txt": b"old"})
    with pytest.raises(PushRejected, match="public"):
        bench.run()
    assert bench.hub.files("me/adapter") == {"old.txt": b"old"}
    bench.run(private=False)
    assert bench.hub.files("me/adapter") == adapter_files() | {"old.txt": b"old"}
    bench.hub.add_model("me/secret", {}, private=True)
    with pytest.raises(PushRejected, match="private=true"):
        bench.run(repo_id="me/secret", private=False)


def test_a_name_without_an_owner_is_the_tokens_own(bench: Bench) -> None:
    assert bench.run(repo_id="bare").repo_id == "me/bare"


def test_the_hubs_refusals_keep_their_meaning(bench: Bench) -> None:
    for token, settings, error in (
        ("hf_revoked", {}, AccessDenied),
        ("hf_valid", {"repo_id": "others/adapter"}, AccessDenied),
        (None, {}, AccessDenied),
    ):
        with pytest.raises(error):
            bench.run(token, **settings)
    (Path(bench.adapters.record.path) / "README.md").write_text("---\nbase_model: {\n---\n")
    with pytest.raises(PushRejected, match="bad metadata"):
        bench.run()
    assert bench.hub.commits("me/adapter") <= 1


def test_failures_on_the_way_are_retried_or_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    bench.hub.fail("upload", status=503, times=2)
    bench.run()
    assert bench.hub.files("me/adapter") == adapter_files()
    bench.hub.fail("commit", status=503)
    with pytest.raises(HubUnavailable):
        bench.run(repo_id="me/other")
    bench.hub.fail("commit", "cut")
    with pytest.raises(StudioError):
        bench.run(repo_id="me/third")
    for repo_id in ("me/other", "me/third"):  # the commit took place, its answer was lost: the next push finds it
        bench.run(repo_id=repo_id)
        assert bench.hub.files(repo_id) == adapter_files() and bench.hub.commits(repo_id) == 2


@pytest.mark.parametrize("route", ["create", "preupload", "upload"])
def test_a_push_that_hangs_is_stopped_at_once_and_commits_nothing(bench: Bench, route: Any) -> None:
    bench.hub.fail(route, "hang")
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            bench.run()
        except ExportStopped as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: bench.hub.requests[route] == 1)
    bench.control.stop()
    thread.join(timeout=600)
    assert not thread.is_alive() and len(outcome) == 1
    bench.hub.release()
    wait_until(lambda: not any(thread.name == "hub-push" for thread in threading.enumerate()))
    assert bench.hub.requests["commit"] == 0


def test_what_nobody_may_push_is_refused_at_the_door(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(token: str | None, **settings: Any) -> None:
        def work() -> None:
            request_token.set(token)
            bench.push.accept(ExportKind.PUSH, bench.adapters.record, bench.settings(**settings))

        copy_context().run(work)

    accept("hf_valid")
    with pytest.raises(AccessDenied, match="needs a token"):
        accept(None)
    with pytest.raises(ModelRejected):
        accept("hf_valid", repo_id="a--b")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable):
        accept("hf_valid")
