import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.errors import (
    AccessDenied,
    HubUnavailable,
    ModelGated,
    ModelNotFound,
    ModelRejected,
    NeedsRemoteCode,
    NoSafeWeights,
    SettingRejected,
    TaskNotFound,
)
from core.settings import Settings
from domain.models.records import Fit, ModelSummary, SearchPage, SearchQuery
from domain.peft.algorithms import Algorithm
from services.hub.client import HubClient
from services.hub.errors import QueryRejected
from services.hub.http import HubHttp, request_token
from services.hub.metadata_cache import DETAILS_TTL_S, SEARCH_TTL_S
from services.model_registry_service import FitOf, ModelRegistryService, build_model_registry_service
from services.models.local import LocalModel
from services.models.safety import check_safe
from tests.support.hub_double import RATE_LIMITED, HubDouble, ManualClock, quiet_environment, safetensors_bytes
from tests.support.registries import make_registry

TEXT: dict[str, Any] = {"pipeline_tag": "text-generation"}
SAFE = TEXT | {"safetensors": {"parameters": {"BF16": 4}, "total": 4}}  # as the Hub describes FILES
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors_bytes({"w": ("BF16", (4,))})}


@dataclass
class Bench:
    """A registry on a double, a manual clock and folders of its own."""

    hub: HubDouble
    clock: ManualClock
    folder: Path
    embedded: LocalModel | None = None

    def registry(self, fit_of: FitOf | None = None, limit_s: float = 30) -> ModelRegistryService:
        """Make a registry as a fresh process would: what is shared is on disk."""
        return make_registry(
            self.hub, self.folder, self.clock, fit_of=fit_of, embedded=lambda: self.embedded, limit_s=limit_s
        )

    def put_local(self, model_id: str, files: dict[str, bytes] = FILES) -> Path:
        folder = self.folder / "models" / model_id
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder

    def go_away(self) -> None:
        for route in ("list", "info", "resolve"):
            self.hub.fail(route, status=503, times=10**6)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    quiet_environment(monkeypatch, tmp_path)
    with HubDouble() as hub:
        yield Bench(hub, ManualClock(), tmp_path)


def ids(page: SearchPage) -> list[str]:
    return [model.summary.model_id for model in page.models]


# Search


def test_a_search_is_the_hubs_then_the_caches_then_stale(bench: Bench) -> None:
    bench.hub.add_model("me/m", {}, **TEXT)
    seen = []
    for step in (0, SEARCH_TTL_S - 1, 1, SEARCH_TTL_S):
        bench.clock.advance(step)
        if step == SEARCH_TTL_S:
            bench.go_away()
        page = bench.registry().search(SearchQuery())
        seen.append((ids(page), page.source, page.stale))

    assert seen == [
        (["me/m"], "hub", False),
        (["me/m"], "cache", False),
        (["me/m"], "hub", False),
        (["me/m"], "cache", True),
    ]
    assert bench.hub.requests["list"] == 2 + 3  # the last is tried three times


def test_how_models_are_judged_asks_the_hub_nothing_new(bench: Bench) -> None:
    registry = bench.registry(lambda *_: None)
    for algorithm in (None, "lora", "qlora"):
        registry.search(SearchQuery(algorithm=algorithm))
    assert bench.hub.requests["list"] == 1


def test_answers_with_and_without_a_token_are_kept_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = bench.registry()
    registry.search(SearchQuery())
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    registry.search(SearchQuery())

    assert bench.hub.requests["list"] == 2
    assert all(b"hf_valid" not in path.read_bytes() for path in (bench.folder / "cache").iterdir())


def test_answers_to_different_tokens_are_kept_apart(bench: Bench) -> None:
    bench.hub.tokens |= {"hf_other"}
    bench.hub.add_model("me/m", FILES, gated="auto", granted=("hf_valid",))
    registry = bench.registry()
    configs = []
    for token in ("hf_valid", "hf_other", None, "hf_valid"):
        previous = request_token.set(token)
        configs.append(registry.details("me/m").details.config)
        request_token.reset(previous)

    assert configs == [CONFIG, None, None, CONFIG]
    assert bench.hub.requests["info"] == 3
    assert all(b"hf_" not in path.read_bytes() for path in (bench.folder / "cache").iterdir())


def test_models_that_are_here_are_marked(bench: Bench) -> None:
    for name in ("me/here", "me/there"):
        bench.hub.add_model(name, {}, **TEXT)
    bench.put_local("me/here")
    registry = bench.registry()
    for _ in range(2):  # from the Hub, then from the cache
        page = registry.search(SearchQuery())
        assert {model.summary.model_id: model.summary.local for model in page.models} == {
            "me/here": True,
            "me/there": False,
        }


def test_without_the_hub_a_search_pages_through_what_is_here(bench: Bench) -> None:
    for name in ("org/a", "org/b", "org/c", "other/d"):
        bench.put_local(name)
    bench.go_away()
    registry = bench.registry()
    names, cursor = [], None
    for _ in range(2):
        page = registry.search(SearchQuery(author="org", limit=2, cursor=cursor))
        names += ids(page)
        cursor = page.next_cursor
        assert (page.source, page.stale, page.fetched_at) == ("local", False, bench.clock.now())

    assert (names, cursor) == (["org/a", "org/b", "org/c"], None)


def test_a_later_page_of_the_hub_is_not_replaced_by_local_models(bench: Bench) -> None:
    bench.put_local("org/a")
    bench.go_away()
    with pytest.raises(HubUnavailable):
        bench.registry().search(SearchQuery(cursor="bmV4dA=="))


@pytest.mark.parametrize("cursor", ["local:-1", "local:x", "local:²", "local:9999999999"])
def test_a_local_cursor_is_a_number(bench: Bench, cursor: str) -> None:
    with pytest.raises(QueryRejected):
        bench.registry().search(SearchQuery(cursor=cursor))


def test_a_limited_hub_says_when_to_ask_again_and_is_left_alone(bench: Bench) -> None:
    bench.put_local("org/a")
    bench.hub.fail("list", status=429, headers=RATE_LIMITED)
    registry = bench.registry()
    for passed_s in (0, 20):
        bench.clock.advance(passed_s)
        with pytest.raises(HubUnavailable) as caught:
            registry.search(SearchQuery())
        assert caught.value.extras == {"retry_after_s": 55.0 - passed_s}
    assert bench.hub.requests["list"] == 1


def test_a_limited_hub_is_answered_for_by_what_is_held(bench: Bench) -> None:
    bench.hub.add_model("me/m", {}, **TEXT)
    registry = bench.registry()
    registry.search(SearchQuery())
    bench.clock.advance(SEARCH_TTL_S)
    bench.hub.fail("list", status=429, headers=RATE_LIMITED)
    page = registry.search(SearchQuery())
    assert (ids(page), page.source, page.stale) == (["me/m"], "cache", True)


def test_a_revoked_token_is_not_taken_for_the_hub_being_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(AccessDenied):
        bench.registry().search(SearchQuery())


# Fit


def fits_if_small(config: dict[str, Any] | None, summary: ModelSummary, algorithm: str) -> Fit | None:
    if summary.parameters is None:
        return None
    needed = summary.parameters * (1 if algorithm == "qlora" else 4)
    return Fit("fits" if needed < 100 else "does_not_fit", needed)


def test_only_fitting_leaves_out_what_does_not_fit_or_is_not_known(bench: Bench) -> None:
    for name, total in (("me/small", 10), ("me/middle", 50), ("me/large", 1000), ("me/unknown", None)):
        bench.hub.add_model(name, {}, safetensors={"total": total} if total else None, **TEXT)
    registry = bench.registry(fits_if_small)

    assert ids(registry.search(SearchQuery(only_fitting=True))) == ["me/small"]
    assert set(ids(registry.search(SearchQuery(only_fitting=True, algorithm="qlora")))) == {"me/small", "me/middle"}
    fits = {model.summary.model_id: model.fit for model in registry.search(SearchQuery(algorithm="lora")).models}
    assert fits["me/middle"] == Fit("does_not_fit", 200)
    assert fits["me/unknown"] is None


def judged_by(configs: list[Any]) -> FitOf:
    def judge(config: dict[str, Any] | None, _summary: ModelSummary, _algorithm: str) -> Fit | None:
        configs.append(config)
        return Fit("fits", 1) if config is not None else None

    return judge


def test_a_list_is_judged_by_configs_that_are_fetched_once_for_good(bench: Bench) -> None:
    for number in range(12):
        bench.hub.add_model(f"me/m{number}", FILES, **SAFE)
    configs: list[Any] = []
    first = bench.registry(judged_by(configs)).search(SearchQuery())

    assert configs == [CONFIG] * 12
    assert {model.fit for model in first.models} == {Fit("fits", 1)}
    assert dict(bench.hub.requests) == {"list": 1, "resolve": 12}
    for step in (1, SEARCH_TTL_S - 2, 1):  # in fresh processes, and after the list itself has been asked for again
        bench.clock.advance(step)
        assert bench.registry(judged_by(configs)).search(SearchQuery()).models == first.models
    assert dict(bench.hub.requests) == {"list": 2, "resolve": 12}

    bench.hub.add_model("me/m0", FILES | {"config.json": b'{"changed": true}'}, **SAFE)
    bench.clock.advance(SEARCH_TTL_S)
    bench.registry(judged_by(configs)).search(SearchQuery())
    assert {"changed": True} in configs
    assert dict(bench.hub.requests) == {"list": 3, "resolve": 13}


def test_only_fitting_leaves_out_what_the_configs_rule_out(bench: Bench) -> None:
    for number in range(4):
        bench.hub.add_model(f"me/m{number}", {"config.json": json.dumps({"number": number}).encode()}, **SAFE)
    bench.hub.add_model("me/none", {"README.md": b""}, **SAFE)
    registry = bench.registry(lambda config, *_: config and Fit("fits" if config["number"] < 2 else "does_not_fit", 1))
    assert set(ids(registry.search(SearchQuery(only_fitting=True)))) == {"me/m0", "me/m1"}


def test_what_may_not_be_read_is_not_judged_and_not_asked_for_again(bench: Bench) -> None:
    bench.hub.add_model("me/gated", FILES, gated="auto", **TEXT)
    bench.hub.add_model("me/disabled", FILES, disabled=True, **TEXT)
    bench.hub.add_model("me/none", {"model.gguf": b"x"}, **TEXT)
    bench.hub.add_model("me/broken", {"config.json": b"{"}, **TEXT)
    bench.hub.add_model("me/other", FILES, library_name="diffusers", **TEXT)
    registry = bench.registry(judged_by([]))
    for _ in range(3):
        assert {model.fit for model in registry.search(SearchQuery()).models} == {None}
        bench.clock.advance(SEARCH_TTL_S / 3 - 1)
    assert dict(bench.hub.requests) == {"list": 1, "resolve": 4}


IN_THE_WAY: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tag": {"tags": ["safetensors", "custom_code"]},
    "code": {"config": {"auto_map": {"AutoModel": "x.X"}}},
    "nested code": {"config": {"text_config": {"auto_map": {"AutoModel": "x.X"}}}},
    "kernel": {"config": {"attn_implementation": "someone/kernel"}},
    "odd kernel": {"config": {"attn_implementation": ["someone/kernel"]}},
    "huge": {"config": {"vocab_size": 1e30}},
    "beyond floats": {"config": {"vocab_size": 10**400}},
    "below floats": {"config": {"vocab_size": -(10**400)}},
    "pickled": {"weights": "pytorch_model.bin", "safetensors": None},
    "elsewhere": {"weights": "onnx/model.safetensors", "safetensors": None, "tags": ["safetensors"]},
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_a_list_says_of_no_model_that_it_fits_where_details_say_that_it_is_blocked(bench: Bench, kind: str) -> None:
    said = SAFE | IN_THE_WAY[kind]
    config, weights = CONFIG | said.pop("config", {}), said.pop("weights", "model.safetensors")
    files = {"config.json": json.dumps(config).encode(), weights: FILES["model.safetensors"]}
    bench.hub.add_model("me/m", files, **said)
    registry = bench.registry(judged_by([]))
    fit = Fit("fits" if kind == "nothing" else "unknown", 1)

    assert [model.fit for model in registry.search(SearchQuery()).models] == [fit]
    assert ids(registry.search(SearchQuery(only_fitting=True))) == (["me/m"] if kind == "nothing" else [])
    assert set(registry.details("me/m").fits.values()) == {fit}


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429, "headers": RATE_LIMITED}, {"kind": "cut"}])
def test_a_hub_that_fails_during_a_list_is_left_alone_for_a_minute(bench: Bench, fault: dict[str, Any]) -> None:
    for number in range(3):
        bench.hub.add_model(f"me/m{number}", FILES, **SAFE)
    bench.hub.fail("resolve", times=99, **fault)
    registry = bench.registry(judged_by([]))
    page = registry.search(SearchQuery())
    asked = bench.hub.requests["resolve"]
    bench.clock.advance(59)
    again = registry.search(SearchQuery())

    assert {model.fit for model in (*page.models, *again.models)} == {None}
    assert len(page.models) == 3
    assert bench.hub.requests["resolve"] == asked <= 3
    bench.hub.recover()
    bench.clock.advance(2)
    assert {model.fit for model in registry.search(SearchQuery()).models} == {Fit("fits", 1)}


def test_a_hub_that_hangs_holds_a_list_up_no_longer_than_it_says(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, **TEXT)
    bench.hub.fail("resolve", "hang")
    registry = bench.registry(judged_by([]), limit_s=0.05)
    assert [model.fit for model in registry.search(SearchQuery()).models] == [None]


def test_stale_lists_are_judged_by_what_is_held(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, **SAFE)
    registry = bench.registry(judged_by([]))
    first = registry.search(SearchQuery())
    bench.clock.advance(SEARCH_TTL_S)
    bench.go_away()
    asked = bench.hub.requests["resolve"]
    page = registry.search(SearchQuery())

    assert (page.stale, page.models) == (True, first.models)
    assert bench.hub.requests["resolve"] == asked


def test_a_page_is_judged_anew_after_a_moment(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, **TEXT)
    configs: list[Any] = []
    registry = bench.registry(judged_by(configs))
    for _ in range(5):
        registry.search(SearchQuery())
    assert len(configs) == 1
    bench.clock.advance(2)
    registry.search(SearchQuery())
    assert len(configs) == 2


def test_only_fitting_is_refused_where_nothing_judges(bench: Bench) -> None:
    with pytest.raises(SettingRejected, match="only_fitting"):
        bench.registry().search(SearchQuery(only_fitting=True))
    assert [model.fit for model in bench.registry().search(SearchQuery()).models] == []


def test_a_model_that_is_here_is_judged_by_its_config(bench: Bench) -> None:
    bench.hub.add_model("me/m", {}, **TEXT)
    bench.put_local("me/m")
    configs: list[Any] = []
    registry = bench.registry(lambda config, *_: configs.append(config))
    registry.search(SearchQuery())
    registry.fit_of_local(registry.local_models()[0])
    assert configs == [CONFIG, CONFIG]


def test_details_are_judged_for_every_algorithm(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, safetensors={"total": 50})
    fits = bench.registry(fits_if_small).details("me/m").fits
    assert {name: fit and fit.verdict for name, fit in fits.items()} == {
        algorithm: "fits" if algorithm == "qlora" else "does_not_fit" for algorithm in Algorithm
    }


# Popular


def test_popular_is_by_downloads(bench: Bench) -> None:
    for name, downloads in (("me/a", 1), ("me/b", 3), ("me/c", 2)):
        bench.hub.add_model(name, {}, downloads=downloads, **TEXT)
    bench.hub.add_model("me/other", {}, downloads=9, pipeline_tag="fill-mask")
    assert ids(bench.registry().popular("text-generation", 2)) == ["me/b", "me/c"]


def test_a_task_nobody_knows_lists_the_tasks(bench: Bench) -> None:
    with pytest.raises(TaskNotFound) as caught:
        bench.registry().popular("text-degeneration", 3)
    assert "text-generation" in caught.value.extras["tasks"]
    assert bench.hub.requests.total() == 0


# Details


def test_details_last_a_day_and_a_commit_lasts_for_good(bench: Bench) -> None:
    commit = bench.hub.add_model("me/m", FILES)
    registry = bench.registry()
    asked = []
    for step in (0, DETAILS_TTL_S - 1, 1, 10 * DETAILS_TTL_S):
        bench.clock.advance(step)
        sources = [registry.details("me/m", revision).source for revision in (None, commit)]
        asked.append(sources)
    assert asked == [["hub", "hub"], ["cache", "cache"], ["hub", "cache"], ["hub", "cache"]]


@pytest.mark.parametrize(("token", "asked_after_s"), [(None, DETAILS_TTL_S), ("hf_valid", 60.0)])
def test_a_config_that_is_withheld_is_asked_for_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, token: str | None, asked_after_s: float
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    commit = bench.hub.add_model("me/gated", FILES, gated="manual")
    registry = bench.registry()
    for revision in (None, commit):
        before = bench.hub.requests["info"]
        registry.details("me/gated", revision)
        bench.clock.advance(asked_after_s - 1)
        registry.details("me/gated", revision)
        assert bench.hub.requests["info"] == before + 1
        bench.clock.advance(1)
        registry.details("me/gated", revision)
        assert bench.hub.requests["info"] == before + 2


def test_a_licence_that_was_accepted_is_noticed_soon(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    bench.hub.add_model("me/gated", FILES, gated="auto")
    registry = bench.registry()
    with pytest.raises(ModelGated):
        registry.config_of("me/gated")
    bench.hub.add_model("me/gated", FILES, granted=("hf_valid",))
    bench.clock.advance(60)

    assert registry.config_of("me/gated") == CONFIG


def test_without_the_hub_details_come_from_the_folder(bench: Bench) -> None:
    bench.put_local("me/m")
    bench.go_away()
    answer = bench.registry().details("me/m")

    assert (answer.source, answer.stale, answer.details.config) == ("local", False, CONFIG)
    assert answer.details.parameters_by_dtype == {"BF16": 4}
    for model_id, revision in (("me/absent", None), ("me/m", "v2")):
        with pytest.raises(HubUnavailable):
            bench.registry().details(model_id, revision)


def test_a_model_that_only_this_machine_has_is_found(bench: Bench) -> None:
    bench.put_local("my-own")
    assert bench.registry().details("my-own").source == "local"
    with pytest.raises(ModelNotFound):
        bench.registry().details("my-other")


def test_a_token_that_the_hub_refuses_hides_no_model_of_this_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    for name in ("my-own", "me/m"):
        bench.put_local(name)
    bench.hub.add_model("me/m", FILES)
    registry = bench.registry()
    for model_id in ("my-own", "me/m"):
        answer = registry.details(model_id)
        assert (answer.source, answer.details.config) == ("local", CONFIG)
    for model_id, revision in (("me/absent", None), ("me/m", "v2")):
        with pytest.raises(AccessDenied):
            registry.details(model_id, revision)


@pytest.mark.parametrize("away", [True, False])
@pytest.mark.parametrize(
    ("files", "error", "why"),
    [
        ({"model.safetensors": b"\xff" * 64}, ModelRejected, "header"),
        ({"model.safetensors": FILES["model.safetensors"][:-1]}, ModelRejected, "describes"),
        ({"config.json": b"{"}, ModelRejected, "my/own"),
        ({"model-00001-of-00002.safetensors": b"", "model.safetensors": None}, ModelRejected, "shard"),
        ({"pytorch_model.bin": b"", "model.safetensors": None}, NoSafeWeights, "safetensors"),
    ],
)
def test_a_folder_that_is_no_model_says_why(
    bench: Bench, away: bool, files: dict[str, bytes | None], error: type[Exception], why: str
) -> None:
    bench.put_local("my/own", {name: data for name, data in (FILES | files).items() if data is not None})
    if away:
        bench.go_away()
    with pytest.raises(error, match=why):
        bench.registry().details("my/own")


def test_details_of_the_hub_say_whether_the_model_is_here(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    assert not bench.registry().details("me/m").details.summary.local
    bench.put_local("me/m")
    assert bench.registry().details("me/m").details.summary.local


# Configs and folders


def test_a_config_comes_from_this_machine_first(bench: Bench) -> None:
    bench.hub.add_model("me/m", {"config.json": b'{"from": "hub"}'})
    bench.put_local("me/m")
    registry = bench.registry()

    assert registry.config_of("me/m") == CONFIG
    assert bench.hub.requests.total() == 0
    assert registry.config_of("me/m", "main") == {"from": "hub"}


def test_a_config_that_is_missing_or_broken_is_said_to_be(bench: Bench) -> None:
    bench.hub.add_model("me/none", {"model.gguf": b"x"})
    bench.hub.add_model("me/broken", {"config.json": b"[1]"})
    with pytest.raises(ModelRejected, match=r"no config\.json"):
        bench.registry().config_of("me/none")
    with pytest.raises(ModelRejected, match="not a JSON object"):
        bench.registry().config_of("me/broken")


@pytest.mark.parametrize("where", ["hub", "here"])
def test_a_config_that_no_model_can_have_is_refused(bench: Bench, where: str) -> None:
    files = {**FILES, "config.json": b'{"model_type": "llama", "num_hidden_layers": 10000000}'}
    if where == "hub":
        bench.hub.add_model("me/m", files)
    else:
        bench.put_local("me/m", files)
    with pytest.raises(ModelRejected, match="num_hidden_layers"):
        bench.registry().config_of("me/m")


def test_a_local_model_is_resolved_to_its_folder(bench: Bench) -> None:
    folder = bench.put_local("me/m")
    bench.embedded = LocalModel("org/embedded", None, ModelSummary("org/embedded"), None, CONFIG)
    registry = bench.registry()
    found = registry.resolve_local("me/m")

    assert found is not None
    assert found.path == folder
    assert [model.model_id for model in registry.local_models()] == ["me/m", "org/embedded"]
    embedded = registry.resolve_local("org/embedded")
    assert embedded is not None and embedded.path is None
    assert registry.config_of("org/embedded") == CONFIG
    assert registry.resolve_local("me/absent") is None


@pytest.mark.parametrize("model_id", ["a/b/c", "../etc", "a--b", "", "a b"])
def test_an_id_that_cannot_be_one_is_refused(bench: Bench, model_id: str) -> None:
    registry = bench.registry()
    for ask in (registry.details, registry.config_of):
        with pytest.raises(ModelRejected):
            ask(model_id)
    assert registry.resolve_local(model_id) is None


def test_clearing_the_cache_asks_the_hub_again(bench: Bench) -> None:
    registry = bench.registry()
    registry.search(SearchQuery())
    registry.clear_cache()
    assert registry.search(SearchQuery()).source == "hub"
    assert bench.hub.requests["list"] == 2


def test_the_service_is_built_from_settings_and_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", bench.hub.url)
    bench.hub.add_model("me/m", FILES, **TEXT)
    folder = bench.put_local("me/here")
    settings = Settings(home=bench.folder / "home", model_dirs=(bench.folder / "models",))
    registry = build_model_registry_service(
        settings, HubClient(HubHttp(bench.clock, bench.clock.sleep)), embedded=None, fit_of=None
    )

    assert ids(registry.search(SearchQuery())) == ["me/m"]
    here = registry.resolve_local("me/here")
    assert here is not None and here.path == folder
    assert list((bench.folder / "home" / "cache" / "hub").iterdir())


# What is in the way of a load

BLOCKED = {
    "nothing": (FILES, None),
    "pickled": ({"config.json": FILES["config.json"], "pytorch_model.bin": b"\x80"}, "pickled weights only"),
    "no weights": ({"config.json": FILES["config.json"]}, "no safetensors weights"),
    "no config": ({"model.safetensors": FILES["model.safetensors"]}, "no config.json"),
    "broken config": (FILES | {"config.json": b"[1]"}, "not a JSON object"),
    "code": (FILES | {"config.json": json.dumps(CONFIG | {"auto_map": {"AutoModel": "x.X"}}).encode()}, "own Python"),
    "huge": (FILES | {"config.json": json.dumps(CONFIG | {"hidden_size": 1e30}).encode()}, "hidden_size"),
}


@pytest.mark.parametrize("kind", BLOCKED)
def test_what_is_in_the_way_of_a_load_is_said_before_one_is_tried(bench: Bench, kind: str) -> None:
    files, reason = BLOCKED[kind]
    bench.hub.add_model("me/m", files)
    registry = bench.registry(fit_of=lambda config, summary, algorithm: Fit("fits", 1))
    found = registry.blockers_of("me/m")
    assert len(found) == (0 if reason is None else 1)
    assert reason is None or reason in found[0]
    fits = {fit.verdict for fit in registry.details("me/m").fits.values() if fit}
    assert fits == {"fits" if reason is None else "unknown"}


def test_a_gated_model_is_in_the_way_until_its_licence_is_accepted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.hub.add_model("me/m", FILES, gated="manual", granted=("hf_granted",))
    bench.hub.tokens |= {"hf_granted", "hf_other"}
    assert "set HF_TOKEN" in bench.registry().blockers_of("me/m")[0]
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    (reason,) = bench.registry().blockers_of("me/m")
    assert "gated" in reason and "set HF_TOKEN" not in reason
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    assert bench.registry().blockers_of("me/m") == []


@pytest.mark.parametrize("gated", [False, "auto"])
def test_a_model_that_the_hub_has_disabled_is_said_to_be(bench: Bench, gated: object) -> None:
    bench.hub.add_model("me/m", FILES, gated=gated, disabled=True)
    registry = bench.registry(judged_by([]))
    (reason,) = registry.blockers_of("me/m")
    assert "disabled by the Hub" in reason and "licence" not in reason
    with pytest.raises(AccessDenied, match="disabled by the Hub") as caught:
        registry.config_of("me/m")
    assert not isinstance(caught.value, ModelGated)


def test_what_is_whole_on_this_machine_has_nothing_in_its_way(bench: Bench) -> None:
    bench.put_local("me/m")
    bench.embedded = LocalModel("org/embedded", None, ModelSummary("org/embedded"), None, CONFIG)
    for model_id in ("me/m", "org/embedded"):
        assert bench.registry().blockers_of(model_id) == []


CODE_IN = {
    "config.json": CONFIG | {"auto_map": {"AutoModel": "x.X"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": "x.X"}},
    "generation_config.json": {"attn_implementation": "someone/kernel"},
}


@pytest.mark.parametrize("name", CODE_IN)
def test_what_a_load_refuses_a_model_of_this_machine_for_is_in_its_way(bench: Bench, name: str) -> None:
    bench.hub.add_model("me/m", FILES, **SAFE)
    folder = bench.put_local("me/m", FILES | {name: json.dumps(CODE_IN[name]).encode()})
    registry = bench.registry(judged_by([]))
    with pytest.raises(NeedsRemoteCode) as refused:
        check_safe(folder, "me/m")

    assert registry.blockers_of("me/m") == [refused.value.detail]
    (listed,) = registry.search(SearchQuery()).models
    here = registry.fit_of_local(registry.local_models()[0])
    fits = [listed.fit, here, *registry.details("me/m").fits.values()]
    assert set(fits) == {Fit("unknown", 1)}
    bench.go_away()
    assert ids(registry.search(SearchQuery(query="m", only_fitting=True))) == []


def test_of_the_models_on_this_machine_those_that_a_load_refuses_are_none_to_take_instead(bench: Bench) -> None:
    bench.put_local("me/blocked", FILES | {"config.json": json.dumps(CODE_IN["config.json"]).encode()})
    bench.put_local("me/plain")
    assert list(bench.registry().local_configs()) == [("me/plain", CONFIG)]


def test_a_file_that_cannot_be_read_is_in_the_way(bench: Bench) -> None:
    folder = bench.put_local("me/m")
    (folder / "odd.json").mkdir()
    (reason,) = bench.registry().blockers_of("me/m")
    assert reason.startswith("me/m cannot be read")


def test_what_is_here_is_judged_by_its_own_config(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES | {"config.json": b'{"from": "hub"}'})
    bench.put_local("me/m")
    configs: list[Any] = []
    bench.registry(judged_by(configs)).details("me/m")
    assert {str(config) for config in configs} == {str(CONFIG)}
