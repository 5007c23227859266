import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from hypothesis import given
from hypothesis import strategies as st

from core import errors
from domain.hub.repos import dataset_repo, model_repo
from domain.models.records import ModelFile, SearchQuery, check_model_id, details_from_wire
from services.hub.client import HubClient, search_params
from services.hub.errors import QueryRejected, map_hub_error
from services.hub.http import HubHttp, request_token
from tests.support.hub_double import RATE_LIMITED, HubDouble, ManualClock, quiet_environment, safetensors_bytes

ANY = SearchQuery(task=None)
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
WEIGHTS = safetensors_bytes({"w": ("BF16", (4, 8))})
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    "model.safetensors": WEIGHTS,
    "onnx/model.onnx": b"x" * 10,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quiet_environment(monkeypatch, tmp_path)


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    with HubDouble() as double:
        yield double


@pytest.fixture
def client(hub: HubDouble, clock: ManualClock) -> HubClient:
    return HubClient(HubHttp(clock, clock.sleep, endpoint=hub.url))


def found(client: HubClient, query: SearchQuery) -> list[str]:
    page = client.search(query).value
    assert page is not None
    return [model.model_id for model in page.models]


# Search


def test_every_filter_reaches_the_hub(hub: HubDouble, client: HubClient) -> None:
    info: dict[str, Any] = {
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["license:mit", "en", "chat"],
        "safetensors": {"parameters": {"BF16": 7_000_000_001}, "total": 7_000_000_001},
        "gated": "manual",
    }
    hub.add_model("me/wanted-model", {}, **info)
    changes: list[dict[str, Any]] = [
        {"pipeline_tag": "fill-mask"},
        {"library_name": "gguf"},
        {"tags": ["license:mit", "en"]},
        {"tags": ["license:apache-2.0", "en", "chat"]},
        {"safetensors": {"total": 6_999_999_999}},
        {"safetensors": {"total": 7_000_000_002}},
        {"safetensors": None},
        {"gated": False},
    ]
    for number, change in enumerate(changes):
        hub.add_model(f"me/wanted-{number}", {}, **info | change)
    hub.add_model("you/wanted", {}, **info)
    hub.add_model("me/other", {}, **info)
    query = SearchQuery(
        query="Wanted",
        author="me",
        library="transformers",
        tags=("en", "chat"),
        license="mit",
        gated=True,
        min_parameters=7_000_000_000,
        max_parameters=7_000_000_001,
    )

    assert found(client, query) == ["me/wanted-model"]


@pytest.mark.parametrize(
    ("sort", "key"),
    [
        ("downloads", "downloads"),
        ("likes", "likes"),
        ("trending", "trendingScore"),
        ("created", "createdAt"),
        ("modified", "lastModified"),
    ],
)
def test_every_order_is_the_hubs(hub: HubDouble, client: HubClient, sort: Any, key: str) -> None:
    values = [f"2025-01-0{n}T00:00:00.000Z" for n in (2, 3, 1)] if "At" in key or "Mod" in key else [2, 3, 1]
    for name, value in zip("abc", values, strict=True):
        info: dict[str, Any] = {key: value}
        hub.add_model(f"me/{name}", {}, **info)

    assert found(client, SearchQuery(task=None, sort=sort)) == ["me/b", "me/a", "me/c"]


def test_pages_follow_the_cursor_of_the_link_header(hub: HubDouble, client: HubClient) -> None:
    for number in range(5):
        hub.add_model(f"me/m{number}", {}, downloads=number)
    names: list[str] = []
    cursor, pages = None, 0
    while pages == 0 or cursor is not None:
        page = client.search(SearchQuery(task=None, limit=2, cursor=cursor)).value
        assert page is not None
        names += [model.model_id for model in page.models]
        cursor, pages = page.next_cursor, pages + 1

    assert names == [f"me/m{number}" for number in (4, 3, 2, 1, 0)]
    assert pages == 3
    assert hub.requests["list"] == 3


@pytest.mark.parametrize(
    "cursor", ["http://169.254.169.254/latest", "a b", "a&sort=likes", "", "x" * 2001, "local:1", "%zz", "%", "%FF"]
)
def test_a_cursor_is_never_an_address(hub: HubDouble, client: HubClient, cursor: str) -> None:
    with pytest.raises(QueryRejected):
        client.search(SearchQuery(cursor=cursor))
    assert hub.requests.total() == 0


@pytest.mark.parametrize(
    "cursor", ["bmV4dA==", "a+b/c_d-e", "p.2~x", "a&b=c d", "a%26b", "é", '{"id":1}', "local:1", "\n"]
)
def test_whatever_a_hub_has_for_a_cursor_comes_back_to_it(hub: HubDouble, client: HubClient, cursor: str) -> None:
    link = {"Link": f'<{hub.url}/api/models?{urlencode({"cursor": cursor})}>; rel="next"'}
    hub.fail("list", status=200, body=b"[]", headers=link)
    page = client.search(ANY).value
    assert page is not None and page.next_cursor is not None

    hub.fail("list", status=200, body=b"[]")
    client.search(SearchQuery(task=None, cursor=page.next_cursor))
    assert hub.seen[-1].query["cursor"] == [cursor]


@pytest.mark.parametrize("url", ["http://[bad", "/api/models?cursor=%ff", f"/api/models?cursor={'%20' * 700}"])
def test_a_list_whose_next_page_cannot_be_told_does_not_end_there(hub: HubDouble, client: HubClient, url: str) -> None:
    hub.fail("list", status=200, body=b"[]", headers={"Link": f'<{url}>; rel="next"'})
    with pytest.raises(errors.HubUnavailable, match="Link"):
        client.search(ANY)


def test_a_tree_whose_next_page_cannot_be_told_does_not_end_there(hub: HubDouble, client: HubClient) -> None:
    commit = hub.add_model("me/m", FILES)
    hub.fail("tree", status=200, body=b"[]", headers={"Link": '<http://[bad>; rel="next"'})
    with pytest.raises(errors.HubUnavailable, match="Link"):
        client.tree(model_repo("me/m"), commit)


def test_items_of_a_list_that_are_no_models_are_left_out(hub: HubDouble, client: HubClient) -> None:
    hub.fail("list", status=200, body=b'[null, {"id": "me/m"}, {"likes": 1}, 3, {"id": "me/n"}]')
    assert found(client, ANY) == ["me/m", "me/n"]


def test_a_cursor_that_the_hub_refuses_is_the_requests_fault(client: HubClient) -> None:
    with pytest.raises(QueryRejected, match="Invalid cursor"):
        client.search(SearchQuery(cursor="bm9wZQ=="))


def test_what_the_hub_does_not_say_is_none(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("bare", {}, downloads=None, likes=None, gated=None, createdAt="2022-03-02T23:29:04.000Z")
    hub.fail("list", status=200, body=b'[{"id": "bare", "createdAt": "2022-03-02T23:29:04.000Z"}]')

    page = client.search(ANY).value

    assert page is not None
    known = {name: value for name, value in vars(page.models[0]).items() if value is not None}
    assert known == {"model_id": "bare", "tags": (), "local": False}


@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_bounds_are_rounded_outwards(minimum: int, maximum: int) -> None:
    sent = dict(search_params(SearchQuery(min_parameters=minimum, max_parameters=maximum)))["num_parameters"]
    low, high = (part.split(":")[1] for part in str(sent).split(","))
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "0": 0}
    read = [int(word[:-1] or 0) * units[word[-1]] if word != "0" else 0 for word in (low, high)]

    for exact, rounded in ((minimum, read[0]), (maximum, read[1])):
        assert abs(exact - rounded) < (10**6 if exact >= 10**6 else 10**3)
    assert read[0] <= minimum
    assert maximum <= read[1]


# Details


def test_details_say_what_the_repository_holds(hub: HubDouble, client: HubClient) -> None:
    commit = hub.add_model(
        "me/chat",
        FILES,
        tags=["license:mit"],
        cardData={"base_model": ["me/base", "me/other"], "language": "en", "license": "mit"},
        safetensors={"parameters": {"BF16": 32}, "total": 32},
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        downloads=3,
    )

    details = client.details("me/chat").value

    assert details is not None
    assert (details.sha, details.revision) == (commit, None)
    assert details.config == CONFIG
    assert details.files == tuple(ModelFile(name, len(data)) for name, data in FILES.items())
    assert details.parameters_by_dtype == {"BF16": 32}
    assert (details.chat_template, details.base_model, details.languages) == (True, "me/base", ("en",))
    assert details.requires_remote_code is False
    summary = details.summary
    assert (summary.size_bytes, summary.parameters, summary.architecture) == (len(WEIGHTS), 32, "LlamaForCausalLM")
    assert (summary.author, summary.license, summary.downloads, summary.gated) == ("me", "mit", 3, False)
    assert summary.created_at == datetime(2024, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("siblings", [5, True, "x", {"rfilename": "config.json"}, [None, 5, {"rfilename": []}]])
def test_a_list_of_files_that_is_none_is_no_files(hub: HubDouble, client: HubClient, siblings: Any) -> None:
    hub.add_model("me/m", FILES, siblings=siblings)
    details = client.details("me/m").value
    assert details is not None
    assert (details.files, details.config) == ((), None)


def test_a_revision_is_that_revision(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", {"config.json": b'{"a": 1}'})
    old = hub.add_model("me/m", {"config.json": b'{"a": 2}'}, revision="refs/pr/1")

    details = client.details("me/m", "refs/pr/1").value

    assert details is not None
    assert (details.sha, details.config) == (old, {"a": 2})


def test_a_renamed_model_is_answered_under_its_new_name_with_sizes(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("new/name", FILES)
    hub.rename("old", "new/name")

    details = client.details("old").value

    assert details is not None
    assert (details.summary.model_id, details.summary.size_bytes) == ("new/name", len(WEIGHTS))
    assert hub.requests["info"] == 2


def test_names_that_lead_to_one_another_are_the_hub_being_away(hub: HubDouble, client: HubClient) -> None:
    hub.rename("me/a", "me/b")
    hub.rename("me/b", "me/a")
    with pytest.raises(errors.HubUnavailable, match="TooManyRedirects"):
        client.details("me/a")


def test_a_gated_model_is_described_without_its_config(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/gated", FILES, gated="manual")

    details = client.details("me/gated").value

    assert details is not None
    assert (details.summary.gated, details.config) == (True, None)
    assert (details.chat_template, details.requires_remote_code) == (None, None)


def test_a_token_that_was_granted_access_reads_the_config(
    hub: HubDouble, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_model("me/gated", FILES, gated="auto", granted=("hf_valid",))
    monkeypatch.setenv("HF_TOKEN", "hf_valid")

    details = client.details("me/gated").value

    assert client.identity
    assert details is not None
    assert details.config == CONFIG


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": "\\ud800"}'])
def test_a_broken_config_is_no_config(hub: HubDouble, client: HubClient, content: bytes) -> None:
    hub.add_model("me/broken", {"config.json": content})

    details = client.details("me/broken").value

    assert details is not None
    assert details.config is None


@pytest.mark.parametrize(
    ("files", "info", "chat", "code"),
    [
        ({"config.json": b'{"auto_map": {"AutoModel": "x.Y"}}'}, {}, False, True),
        ({"config.json": b"{}", "chat_template.jinja": b"x"}, {}, True, False),
        ({"config.json": b"{}", "tokenizer_config.json": b"{}"}, {}, False, False),
        ({"config.json": b"{}", "tokenizer_config.json": b"["}, {}, None, False),
        ({"README.md": b""}, {"tags": ["custom_code"]}, False, True),
        ({"README.md": b""}, {"config": {"tokenizer_config": {"chat_template": "x"}}}, True, None),
    ],
)
def test_chat_template_and_remote_code(
    hub: HubDouble,
    client: HubClient,
    files: dict[str, bytes],
    info: dict[str, Any],
    chat: bool | None,
    code: bool | None,
) -> None:
    hub.add_model("me/m", files, **info)

    details = client.details("me/m").value

    assert details is not None
    assert (details.chat_template, details.requires_remote_code) == (chat, code)


def test_an_answer_that_has_not_changed_is_not_sent_again(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", FILES)
    etag = client.details("me/m").etag

    again = client.details("me/m", etag=etag)

    assert etag is not None
    assert (again.value, again.etag) == (None, etag)
    assert hub.requests["resolve"] == 2


def test_an_empty_answer_is_not_taken_for_one_that_has_not_changed(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", FILES)
    hub.fail("info", status=200, body=b"null", headers={"ETag": '"another"'})
    with pytest.raises(errors.HubUnavailable):
        client.details("me/m", etag='"held"')


def test_weights_are_never_asked_for(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", FILES)
    client.details("me/m")

    assert {seen.path.split("/")[-1] for seen in hub.seen if seen.route == "resolve"} == {
        "config.json",
        "tokenizer_config.json",
    }


# Ids


@pytest.mark.parametrize("model_id", ["gpt2", "a/b", "a_b/c.d-e", "A/B_", "0/1", "a/" + "b" * 94])
def test_ids_of_the_hub_are_accepted(model_id: str) -> None:
    check_model_id(model_id)


@pytest.mark.parametrize(
    "model_id",
    [
        *("", "/", "a/", "/a", "a/b/c", "a//b", "..", "../a", "a/..", "a..b", "a--b", ".a", "a.", "-a", "a/b.git"),
        *("a b", "a\n", "é", "a/b?x", "a%2fb", "a/" + "b" * 95),
    ],
)
def test_other_ids_never_reach_the_hub(hub: HubDouble, client: HubClient, model_id: str) -> None:
    with pytest.raises(errors.ModelRejected):
        client.details(model_id)
    assert hub.requests.total() == 0


@pytest.mark.parametrize("revision", ["", "../x", "a//b", "a?b", "-x", "a" * 101, "a/"])
def test_other_revisions_never_reach_the_hub(hub: HubDouble, client: HubClient, revision: str) -> None:
    with pytest.raises(errors.ModelRejected):
        client.details("a/b", revision)
    assert hub.requests.total() == 0


# Errors


def test_a_missing_model_and_a_missing_revision_are_not_found(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", FILES)
    for arguments in (("me/absent", None), ("me/m", "absent")):
        with pytest.raises(errors.ModelNotFound):
            client.details(*arguments)


def test_a_revoked_token_is_named_and_never_shown(
    hub: HubDouble, client: HubClient, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked_secret")
    hub.add_model("me/m", FILES)
    for ask in (lambda: client.details("me/m"), lambda: client.search(ANY)):
        with pytest.raises(errors.AccessDenied, match="HF_TOKEN") as caught:
            ask()
        assert "hf_revoked_secret" not in f"{caught.value!r}{caught.value.extras}"
    output = capfd.readouterr()
    assert "hf_revoked_secret" not in output.out + output.err


def test_a_pause_that_is_long_is_told_and_kept(hub: HubDouble, client: HubClient, clock: ManualClock) -> None:
    hub.fail("list", status=429, headers=RATE_LIMITED)
    for passed_s in (0, 20):
        clock.advance(passed_s)
        with pytest.raises(errors.HubUnavailable) as caught:
            client.search(ANY)
        assert caught.value.extras == {"retry_after_s": 55.0 - passed_s}
    clock.advance(35)

    assert found(client, ANY) == []
    assert hub.requests["list"] == 2
    assert clock.slept_s == []


def test_a_window_that_is_used_up_is_waited_out_before_it_is_told(
    hub: HubDouble, client: HubClient, clock: ManualClock
) -> None:
    """The answer is good, but says that the next request would be refused for eight seconds."""
    hub.fail("list", status=200, body=b"[]", headers={"RateLimit": '"api";r=0;t=8'})
    hub.fail("list", status=200, body=b"[]", headers={"RateLimit": '"api";r=400;t=299'})
    for _ in range(3):
        client.search(ANY)
    assert clock.slept_s == [8.0]


def test_a_pause_of_files_is_none_of_the_api_and_one_token_s_is_none_of_anothers(
    hub: HubDouble, client: HubClient
) -> None:
    hub.add_model("me/m", FILES)
    hub.fail("resolve", status=429, headers={"RateLimit": '"resolvers";r=0;t=100'})
    with pytest.raises(errors.HubUnavailable):
        client.details("me/m")
    assert found(client, ANY) == ["me/m"]
    with pytest.raises(errors.HubUnavailable):
        client.listed_config("me/m", "main")
    token = request_token.set("hf_valid")
    try:
        assert client.listed_config("me/m", "main") == CONFIG
    finally:
        request_token.reset(token)
    assert hub.requests["resolve"] == 2


def test_everyone_waits_out_a_short_pause(hub: HubDouble, client: HubClient, clock: ManualClock) -> None:
    hub.fail("list", status=503, headers={"Retry-After": "11"})
    with pytest.raises(errors.HubUnavailable):
        client.search(ANY)
    clock.advance(2)
    assert found(client, ANY) == []
    assert clock.slept_s == [9.0]


class HastyClock(ManualClock):
    """A clock that moves more than a minute whenever it is looked at: each piece that arrives is late."""

    def monotonic(self) -> float:
        self.advance(61)
        return super().monotonic()


def test_a_hub_that_drips_is_given_up(hub: HubDouble) -> None:
    hub.add_model("me/m", FILES, cardData={"text": "x" * 10_000})
    hub.fail("info", "drip")
    clock = HastyClock()
    with pytest.raises(errors.HubUnavailable, match="more than 60 s"):
        HubClient(HubHttp(clock, clock.sleep, endpoint=hub.url)).details("me/m")
    assert hub.requests["info"] == 1


@pytest.mark.parametrize(
    ("status", "code", "message", "sent", "expected"),
    [
        (401, None, "Invalid username or password.", False, errors.ModelNotFound),
        (401, "RepoNotFound", "Repository not found", False, errors.ModelNotFound),
        (401, "GatedRepo", "Access to model is restricted.", False, errors.ModelGated),
        (401, None, "Invalid credentials in Authorization header", True, errors.AccessDenied),
        (401, None, "Invalid username or password.", True, errors.AccessDenied),
        (401, "GatedRepo", "Access to model is restricted.", True, errors.ModelGated),
        (403, "GatedRepo", "Access to model is restricted.", True, errors.ModelGated),
        (403, None, "Access to this resource is disabled.", False, errors.AccessDenied),
        (404, "RepoNotFound", "Repository not found", True, errors.ModelNotFound),
        (404, "RevisionNotFound", "Invalid rev id: x", False, errors.ModelNotFound),
    ],
)
def test_what_does_not_exist_is_told_from_what_may_not_be_seen(
    hub: HubDouble,
    client: HubClient,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str | None,
    message: str,
    sent: bool,
    expected: type[errors.StudioError],
) -> None:
    if sent:
        monkeypatch.setenv("HF_TOKEN", "hf_valid")
    hub.fail("info", status=status, headers={"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))
    with pytest.raises(errors.StudioError) as caught:
        client.details("me/m")
    assert type(caught.value) is expected


def test_a_disabled_model_is_described_without_its_config(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", FILES, disabled=True)
    details = client.details("me/m").value
    assert details is not None
    assert (details.summary.size_bytes, details.config) == (len(WEIGHTS), None)


def test_a_pause_that_is_short_is_waited_for(hub: HubDouble, client: HubClient, clock: ManualClock) -> None:
    hub.fail("list", status=429, headers={"Retry-After": "7"})
    dates = {"Date": "Fri, 21 Mar 2025 11:19:30 GMT", "Retry-After": "Fri, 21 Mar 2025 11:19:33 GMT"}
    hub.fail("list", status=503, headers=dates)

    assert found(client, ANY) == []
    assert clock.slept_s == [7.0, 3.0]


def test_passing_faults_are_tried_again_a_bounded_number_of_times(
    hub: HubDouble, client: HubClient, clock: ManualClock
) -> None:
    hub.fail("list", status=503, times=2)
    assert found(client, ANY) == []
    assert hub.requests["list"] == 3

    hub.fail("list", status=502, times=9)
    with pytest.raises(errors.HubUnavailable, match="502"):
        client.search(ANY)
    assert hub.requests["list"] == 6
    assert clock.slept_s == [1.0, 2.0, 1.0, 2.0]


def test_a_cut_connection_is_tried_again(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", FILES)
    hub.fail("info", "cut")

    assert client.details("me/m").value is not None
    assert hub.requests["info"] == 2


def test_a_hub_that_hangs_is_given_up(hub: HubDouble, clock: ManualClock) -> None:
    hub.fail("list", "hang", times=3)
    with pytest.raises(errors.HubUnavailable, match="ReadTimeout"):
        HubClient(HubHttp(clock, clock.sleep, endpoint=hub.url, timeout_s=0.05)).search(ANY)
    assert hub.requests["list"] == 3


def test_a_hub_that_has_hung_is_not_waited_for_again_for_a_while(hub: HubDouble, clock: ManualClock) -> None:
    hub.add_model("me/m", FILES)
    hub.fail("list", "hang", times=3)
    client = HubClient(HubHttp(clock, clock.sleep, endpoint=hub.url, timeout_s=0.05))
    with pytest.raises(errors.HubUnavailable, match="ReadTimeout"):
        client.search(ANY)
    hub.release()
    clock.advance(14)
    for _ in range(3):
        with pytest.raises(errors.HubUnavailable, match="asked again shortly") as refusal:
            client.details("me/m")
    assert "retry_after_s" not in refusal.value.extras  # lists then show what is on this machine
    assert hub.requests == {"list": 3}
    clock.advance(1)
    assert client.details("me/m").value is not None


def test_a_hub_that_is_not_there_is_asked_once(clock: ManualClock) -> None:
    with pytest.raises(errors.HubUnavailable):
        HubClient(HubHttp(clock, clock.sleep, endpoint="http://127.0.0.1:1")).search(ANY)
    assert clock.slept_s == []


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"{}", b"3", b'[{"likes": 1}]', b"[3]", b"", b"null"])
def test_a_captive_portals_answer_is_the_hub_being_away(hub: HubDouble, client: HubClient, body: bytes) -> None:
    hub.fail("list", status=200, body=body)
    with pytest.raises(errors.HubUnavailable):
        client.search(ANY)


def test_half_an_answer_is_the_hub_being_away(hub: HubDouble, client: HubClient) -> None:
    hub.add_model("me/m", FILES)
    hub.fail("info", "short")
    with pytest.raises(errors.HubUnavailable):
        client.details("me/m")


def test_offline_mode_asks_nobody(hub: HubDouble, client: HubClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(errors.HubUnavailable, match="HF_HUB_OFFLINE"):
        client.search(ANY)
    assert hub.requests.total() == 0


def test_the_endpoint_is_the_environments(monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example/")
    assert HubClient(HubHttp(clock, clock.sleep)).endpoint == "http://mirror.example"


def response(status: int, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, request=httpx.Request("GET", "https://hub.example/api/models/a/b"))


def local_entry(cause: Exception | None) -> Exception:
    error = hub_errors.LocalEntryNotFoundError("not cached")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (hub_errors.GatedRepoError("x", response=response(403)), errors.ModelGated),
        (hub_errors.RepositoryNotFoundError("x", response=response(404)), errors.ModelNotFound),
        (hub_errors.RevisionNotFoundError("x", response=response(404)), errors.ModelNotFound),
        (hub_errors.DisabledRepoError("x", response=response(403)), errors.AccessDenied),
        (hub_errors.RemoteEntryNotFoundError("x", response=response(404)), errors.ModelRejected),
        (hub_errors.BadRequestError("x", response=response(400)), errors.ModelRejected),
        (hub_errors.HfHubHTTPError("x", response=response(401)), errors.ModelNotFound),
        (hub_errors.HfHubHTTPError("x", response=response(403)), errors.AccessDenied),
        (hub_errors.HfHubHTTPError("x", response=response(404)), errors.ModelNotFound),
        (hub_errors.HfHubHTTPError("x", response=response(418)), errors.HubUnavailable),
        (hub_errors.HfHubHTTPError("x", response=response(429, Retry_After="soon")), errors.HubUnavailable),
        (hub_errors.HfHubHTTPError("x", response=response(500)), errors.HubUnavailable),
        (hub_errors.HFValidationError("x"), errors.ModelRejected),
        (hub_errors.OfflineModeIsEnabled("x"), errors.HubUnavailable),
        (local_entry(None), errors.HubUnavailable),
        (local_entry(hub_errors.GatedRepoError("x", response=response(403))), errors.ModelGated),
        (httpx.ConnectError("x"), errors.HubUnavailable),
        (httpx.TooManyRedirects("x"), errors.HubUnavailable),
        (httpx.InvalidURL("x"), errors.HubUnavailable),
        (ConnectionResetError(104, "x"), errors.HubUnavailable),
        (OSError("Consistency check failed"), errors.HubUnavailable),
        (OSError(28, "No space left on device"), errors.StorageFull),
        (errors.ModelGated("x"), errors.ModelGated),
    ],
)
def test_every_error_of_the_client_has_one_of_ours(error: Exception, expected: type[errors.StudioError]) -> None:
    assert type(map_hub_error(error, model_repo("a/b"))) is expected
    if not isinstance(error, errors.StudioError):
        slug = map_hub_error(error, dataset_repo("a/b")).slug
        assert slug == expected.slug.replace("model-", "dataset-")


@pytest.mark.parametrize("error", [PermissionError(13, "x"), RuntimeError("x")])
def test_an_error_that_is_not_the_hubs_is_not_blamed_on_it(error: Exception) -> None:
    assert type(map_hub_error(error, model_repo("a/b"))) is errors.StudioError


# The double, and the real Hub's answers


def test_huggingface_hub_itself_downloads_from_the_double(hub: HubDouble, tmp_path: Path) -> None:
    commit = hub.add_model("me/m", FILES)
    folder = Path(snapshot_download("me/m", endpoint=hub.url, cache_dir=tmp_path, token="hf_valid"))

    assert folder.name == commit
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(FILES)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert all("Authorization" not in seen.headers for seen in hub.seen if seen.route == "cdn")
    assert any("Authorization" in seen.headers for seen in hub.seen if seen.route == "resolve")


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text())))
def test_odd_fields_hide_nothing_else(odd: dict[str, Any]) -> None:
    names = ["tags", "gated", "downloads", "likes", "safetensors", "siblings", "config", "cardData", "createdAt"]
    payload = dict(zip(names, odd.values(), strict=False)) | {"id": "a/b"}
    assert details_from_wire(payload, None, None, None).summary.model_id == "a/b"


def test_nothing_heavy_is_imported_to_make_a_client() -> None:
    code = (
        "import sys, time; from services.hub.client import HubClient; from services.hub.http import HubHttp; "
        "import services.model_registry_service;"
        "from core.clock import SystemClock; HubClient(HubHttp(SystemClock(), time.sleep));"
        "early = [m for m in ('torch', 'transformers', 'huggingface_hub', 'httpx') if m in sys.modules];"
        "import huggingface_hub; huggingface_hub.HfApi; huggingface_hub.scan_cache_dir;"
        "late = [m for m in ('torch', 'transformers') if m in sys.modules]; print(early, late)"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
