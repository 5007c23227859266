import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from core.errors import HubUnavailable, ModelNotFound
from domain.models.records import ModelDetails, ModelSummary
from services.hub.metadata_cache import Cached, Fetched, MetadataCache
from tests.support.hub_double import ManualClock

TEXT = TypeAdapter(str)
TTL_S = 3600.0


@dataclass
class Upstream:
    """Answers with a number that grows, or as told."""

    asked: int = 0
    away: bool = False
    unchanged: bool = False
    etags: tuple[str | None, ...] = ()

    def __call__(self, etag: str | None) -> Fetched[str]:
        self.asked += 1
        self.etags += (etag,)
        if self.away:
            raise HubUnavailable("away")
        return Fetched(None if self.unchanged else f"answer {self.asked}", f"etag {self.asked}")


@pytest.fixture
def cache(tmp_path: Path, clock: ManualClock) -> MetadataCache:
    return MetadataCache(tmp_path / "hub", clock)


def ask(cache: MetadataCache, upstream: Upstream, *, key: str = "k", ttl_s: float | None = TTL_S) -> Cached[str]:
    return cache.get(key, TEXT, upstream, lambda _: ttl_s)


def test_an_answer_is_served_for_its_time_to_live(cache: MetadataCache, clock: ManualClock) -> None:
    upstream = Upstream()
    first = ask(cache, upstream)
    clock.advance(TTL_S - 1)
    second = ask(cache, upstream)
    clock.advance(1)
    third = ask(cache, upstream)

    assert [(item.value, item.source) for item in (first, second, third)] == [
        ("answer 1", "hub"),
        ("answer 1", "cache"),
        ("answer 2", "hub"),
    ]
    assert second.fetched_at == first.fetched_at < third.fetched_at == clock.now()


def test_an_answer_outlives_the_process(cache: MetadataCache, clock: ManualClock, tmp_path: Path) -> None:
    ask(cache, Upstream())
    assert ask(MetadataCache(tmp_path / "hub", clock), Upstream()).source == "cache"


def test_an_answer_for_good_never_ages(cache: MetadataCache, clock: ManualClock) -> None:
    ask(cache, Upstream(), ttl_s=None)
    clock.advance(10 * 365 * 86400)
    assert ask(cache, Upstream(), ttl_s=None).source == "cache"


def test_an_old_answer_is_revalidated_by_its_etag(cache: MetadataCache, clock: ManualClock) -> None:
    upstream = Upstream()
    ask(cache, upstream)
    clock.advance(TTL_S)
    upstream.unchanged = True
    again = ask(cache, upstream)

    assert upstream.etags == (None, "etag 1")
    assert (again.value, again.source, again.fetched_at) == ("answer 1", "hub", clock.now())
    assert ask(cache, upstream).source == "cache"


def test_an_old_answer_is_served_stale_while_the_hub_is_away(cache: MetadataCache, clock: ManualClock) -> None:
    upstream = Upstream()
    first = ask(cache, upstream)
    clock.advance(TTL_S)
    upstream.away = True
    stale = ask(cache, upstream)
    upstream.away = False

    assert (stale.value, stale.stale, stale.source) == ("answer 1", True, "cache")
    assert stale.fetched_at == first.fetched_at
    assert ask(cache, upstream).stale is False


def test_nothing_held_and_the_hub_away_is_an_error(cache: MetadataCache) -> None:
    with pytest.raises(HubUnavailable):
        ask(cache, Upstream(away=True))


def test_an_error_about_the_question_is_not_hidden_by_an_old_answer(cache: MetadataCache, clock: ManualClock) -> None:
    def gone(_: str | None) -> Fetched[str]:
        raise ModelNotFound("gone")

    ask(cache, Upstream())
    clock.advance(TTL_S)
    with pytest.raises(ModelNotFound):
        cache.get("k", TEXT, gone, lambda _: TTL_S)


def test_an_answer_from_the_future_is_revalidated(cache: MetadataCache, clock: ManualClock) -> None:
    upstream = Upstream()
    ask(cache, upstream)
    clock.advance(-86400)
    assert ask(cache, upstream).source == "hub"


def test_keys_do_not_share_answers(cache: MetadataCache) -> None:
    upstream = Upstream()
    assert ask(cache, upstream, key="../../a").value != ask(cache, upstream, key="../../b").value


def test_clearing_forgets_everything_and_may_be_repeated(cache: MetadataCache) -> None:
    cache.clear()
    ask(cache, Upstream())
    cache.clear()
    cache.clear()
    assert ask(cache, Upstream()).source == "hub"


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_an_entry_rebuild_it(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("hub")
    cache = MetadataCache(folder, ManualClock())
    ask(cache, Upstream())
    entry = next(folder.iterdir())
    entry.write_bytes(content)

    assert ask(cache, Upstream()).source == "hub"
    assert ask(cache, Upstream()).source == "cache"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_never_breaks_an_answer(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("hub")
    cache = MetadataCache(folder, ManualClock())
    ask(cache, Upstream())
    entry = next(folder.iterdir())
    content = bytearray(entry.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    entry.write_bytes(content)

    assert isinstance(ask(cache, Upstream()).value, str)


def test_what_is_held_is_seen_without_asking(cache: MetadataCache, clock: ManualClock) -> None:
    assert cache.peek("k", TEXT, lambda _: TTL_S) is None
    ask(cache, Upstream())
    for step, stale in ((TTL_S - 1, False), (1, True)):
        clock.advance(step)
        held = cache.peek("k", TEXT, lambda _: TTL_S)
        assert held is not None
        assert (held.value, held.stale) == ("answer 1", stale)


def test_an_entry_is_parsed_once_as_long_as_its_file_stays(cache: MetadataCache, tmp_path: Path) -> None:
    many = TypeAdapter(list[str])
    cache.get("k", many, lambda _: Fetched(["a"], None), lambda _: TTL_S)
    first, second = (cache.get("k", many, lambda _: Fetched([], None), lambda _: TTL_S).value for _ in range(2))
    assert first is second
    entry = next((tmp_path / "hub").iterdir())
    entry.write_bytes(entry.read_bytes().replace(b'"a"', b'"b"'))  # as long as before
    assert cache.get("k", many, lambda _: Fetched([], None), lambda _: TTL_S).value == ["b"]


def test_the_oldest_entries_make_room(tmp_path: Path, clock: ManualClock) -> None:
    cache = MetadataCache(tmp_path / "hub", clock, max_entries=10)
    upstream = Upstream()
    for number in range(11):
        ask(cache, upstream, key=str(number))
        os.utime(max((tmp_path / "hub").iterdir(), key=lambda path: path.stat().st_mtime), (number, number))
    assert len(list((tmp_path / "hub").iterdir())) == 5
    assert ask(cache, upstream, key="10").source == "cache"


def test_an_entry_of_another_shape_is_rebuilt(cache: MetadataCache) -> None:
    ask(cache, Upstream())
    numbers = cache.get("k", TypeAdapter(list[int]), lambda _: Fetched([1], None), lambda _: TTL_S)
    assert (numbers.value, numbers.source) == ([1], "hub")


def test_a_disk_that_cannot_keep_an_answer_does_not_lose_it(tmp_path: Path, clock: ManualClock) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = MetadataCache(tmp_path / "file" / "hub", clock)
    assert ask(cache, Upstream()).value == "answer 1"


def test_records_survive_the_disk_exactly(cache: MetadataCache, clock: ManualClock) -> None:
    adapter = TypeAdapter(ModelDetails)
    config = {"limit": [0.0, float("inf")], "deep": {"a": [None, True]}, "text": "é\u2028"}
    summary = ModelSummary("a/b", tags=("x",), created_at=clock.now())
    details = ModelDetails(summary, "sha", None, (), {"BF16": 2**60}, config, None, None, ("en",), True)
    cache.get("k", adapter, lambda _: Fetched(details, None), lambda _: TTL_S)
    read = cache.get("k", adapter, lambda _: Fetched(None, None), lambda _: TTL_S)

    assert (read.source, read.value) == ("cache", details)


class CountedKey(str):
    """A key that opens a gate once it has been looked up a number of times: how a test knows who has asked."""

    def __new__(cls, text: str, lookups: int) -> "CountedKey":
        key = super().__new__(cls, text)
        key.left, key.lock, key.gate = lookups, threading.Lock(), threading.Event()
        return key

    left: int
    lock: threading.Lock
    gate: threading.Event

    def __hash__(self) -> int:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                self.gate.set()
        return super().__hash__()


@given(threads=st.integers(2, 8), fails=st.booleans())
@settings(max_examples=40, deadline=None)
def test_however_many_ask_upstream_is_asked_once(
    tmp_path_factory: pytest.TempPathFactory, threads: int, fails: bool
) -> None:
    cache = MetadataCache(tmp_path_factory.mktemp("hub"), ManualClock())
    # The first looks its flight up and registers it, the others look it up: upstream answers when all have.
    key = CountedKey("k", threads + 1)
    asked: list[int] = []

    def upstream(_: str | None) -> Fetched[str]:
        asked.append(1)
        assert key.gate.wait(600)
        if fails:
            raise HubUnavailable("away")
        return Fetched("answer", None)

    def one() -> str:
        try:
            return cache.get(key, TEXT, upstream, lambda _: 0.0).value
        except HubUnavailable as error:
            return error.detail

    with ThreadPoolExecutor(threads) as pool:
        answers = [pool.submit(one) for _ in range(threads)]
        got = [answer.result() for answer in answers]

    assert got == ["away" if fails else "answer"] * threads
    assert len(asked) == 1
