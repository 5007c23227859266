import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from core.errors import ModelNotFound
from domain.models.records import ModelFile, ModelSummary, SearchQuery, weight_files
from services.hub.cache_dir import commit_at
from services.models.local import LocalModel, LocalModels
from tests.support.hub_double import HubDouble, quiet_environment, safetensors_bytes

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "transformers_version": "5.0"}
WEIGHTS = safetensors_bytes({"a": ("BF16", (3, 4)), "b": ("F32", (5,))})

CACHED = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quiet_environment(monkeypatch, tmp_path)


def make(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True)
    content = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS} | (files or {})
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def models_of(*roots: Path, **more: Any) -> LocalModels:
    given: dict[str, Any] = {"prepared_dir": None, "hub_cache_dir": lambda: None, "embedded": None}
    return LocalModels(roots, **given | more)


def ids(models: LocalModels) -> list[str]:
    return [model.model_id for model in models.all()]


def test_models_lie_one_or_two_levels_down(tmp_path: Path) -> None:
    for name in ("plain", "org/name", "org/deeper/name", ".hidden", "bad--name"):
        make(tmp_path / name)
    assert ids(models_of(tmp_path)) == ["org/name", "plain"]


def test_a_summary_says_what_the_headers_and_the_config_say(tmp_path: Path) -> None:
    folder = make(tmp_path / "org" / "name")
    (model,) = models_of(tmp_path).all()

    assert (model.path, model.revision) == (folder, None)
    known = {name: value for name, value in vars(model.summary).items() if value not in (None, ())}
    assert known == {
        "model_id": "org/name",
        "author": "org",
        "task": "text-generation",
        "library": "transformers",
        "parameters": 17,
        "size_bytes": len(WEIGHTS),
        "architecture": "LlamaForCausalLM",
        "local": True,
    }


def test_details_say_what_the_folder_holds(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": b'{"chat_template": "x"}', "README.md": b"# hi"}
    make(tmp_path / "m", files)
    models = models_of(tmp_path)
    details = models.details(models.all()[0])

    assert details.parameters_by_dtype == {"BF16": 12, "F32": 5}
    assert details.config == CONFIG
    assert (details.chat_template, details.requires_remote_code) == (True, False)
    assert ModelFile("README.md", 4) in details.files
    assert len(details.files) == 4


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{"},
        {"config.json": b"[]"},
        {"model.safetensors": WEIGHTS[:-1]},
        {"model.safetensors": WEIGHTS + b"x"},
        {"model.safetensors": b""},
        {"model.safetensors": b"\xff" * 64},
    ],
)
def test_what_is_broken_is_no_model(tmp_path: Path, files: dict[str, bytes]) -> None:
    make(tmp_path / "broken", files)
    make(tmp_path / "whole")
    assert ids(models_of(tmp_path)) == ["whole"]


def test_a_missing_shard_is_no_model(tmp_path: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    folder = make(tmp_path / "m", {one: WEIGHTS, two: WEIGHTS})
    (folder / "model.safetensors").unlink()
    models = models_of(tmp_path)

    assert [model.summary.parameters for model in models.all()] == [34]
    (folder / two).unlink()
    assert ids(models) == []


def link_all(folder: Path, source: Path) -> None:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)


@pytest.mark.parametrize("relative", [False, True])
def test_the_operators_links_are_followed(tmp_path: Path, relative: bool) -> None:
    disk, root = tmp_path / "disk", tmp_path / "root"
    one = make(disk / "one", {"tokenizer_config.json": b'{"chat_template": "x"}'})
    make(disk / "org" / "two")
    make(disk / "org" / "three")
    (root / "team").mkdir(parents=True)

    def link(name: str, target: Path) -> None:
        leads = os.path.relpath(target, (root / name).parent) if relative else target
        (root / name).symlink_to(leads)

    link("one", one)
    link("org", disk / "org")  # a folder of models
    link("team/one", one)
    link("again", root / "one")  # a link to a link
    link_all(root / "files", one)
    models = models_of(root)
    expected = ["again", "files", "one", "org/three", "org/two", "team/one"]
    assert ids(models) == expected and models.left_out() == []
    for model_id in expected:
        found = models.find(model_id)
        assert found is not None and found.summary.parameters == 17 and models.flaw(model_id) is None
        details = models.details(found)
        assert len(details.files) in (2, 3) and details.parameters_by_dtype == {"BF16": 12, "F32": 5}
    files = models.find("files")
    assert files is not None and models.details(files).chat_template is True


def test_a_root_that_is_a_link_is_followed(tmp_path: Path) -> None:
    make(tmp_path / "disk" / "m")
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    assert ids(models_of(tmp_path / "root")) == ["m"]


def test_a_link_into_the_hubs_cache_is_followed(tmp_path: Path) -> None:
    cache = tmp_path / "hub-cache"
    with HubDouble() as hub:
        hub.add_model("org/m", CACHED)
        snapshot = snapshot_download("org/m", endpoint=hub.url, cache_dir=cache)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mine").symlink_to(snapshot)
    models = models_of(tmp_path / "root", hub_cache_dir=lambda: cache)
    mine = models.find("mine")
    assert mine is not None and models.details(mine).parameters_by_dtype == {"BF16": 12, "F32": 5}


def test_what_is_passed_over_is_said_with_the_reason(tmp_path: Path) -> None:
    root, nowhere = tmp_path / "root", tmp_path / "unmounted" / "m"
    make(root / "sound")
    (root / "team").mkdir()
    for name, target in {
        "dangling": nowhere, "team/gone": nowhere, "self": root / "self", "there": root / "back",
        "back": root / "there", "above": root, "team/up": root / "team", "top": tmp_path,
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    make(root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()
    (root / "weightless" / "model.safetensors").symlink_to(nowhere / "model.safetensors")
    make(root / "configless")
    (root / "configless" / "config.json").unlink()
    (root / "configless" / "config.json").symlink_to(nowhere / "config.json")
    make(root / "org" / "deep" / "m")
    make(root / "pickled", {"pytorch_model.bin": b"x"})
    (root / "pickled" / "model.safetensors").unlink()
    (root / "file.txt").write_text("x")
    (root / ".hidden").symlink_to(nowhere)

    models = models_of(root)
    assert ids(models) == ["sound"]
    said = {path.relative_to(root).as_posix(): reason for path, reason in models.left_out()}
    expected = {
        "dangling": f"it is a link to {nowhere}, where there is nothing",
        "team/gone": f"it is a link to {nowhere}, where there is nothing",
        "self": "it is a link in a circle",
        "there": "it is a link in a circle",
        "back": "it is a link in a circle",
        "above": f"it is a link back to {root}, in which it lies",
        "top": f"it is a link back to {tmp_path}, in which it lies",
        "team/up": f"it is a link back to {root / 'team'}, in which it lies",
        "weightless": f"model.safetensors is a link to {nowhere}/model.safetensors, where there is nothing",
        "configless/config.json": f"it is a link to {nowhere}/config.json, where there is nothing",
        "org/deep": "it has no config.json",
        "pickled": f"pickled has no safetensors weights in {root / 'pickled'}.",
    }
    assert said == expected
    for name in ("dangling", "team/gone", "self", "there", "above", "team/up", "org/deep", "configless"):
        flaw = models.flaw(name)
        assert isinstance(flaw, ModelNotFound) and name in flaw.detail, name
    for inner in ("dangling/m", "self/m", "above/sound"):
        assert isinstance(models.flaw(inner), ModelNotFound)
    assert models.flaw("nothing") is None and models.flaw("org/nothing") is None
    assert models.unreadable_dirs() == ()
    assert models_of(nowhere).unreadable_dirs() == (f"{nowhere} of PEFT_STUDIO_MODEL_DIRS does not exist",)


def test_what_the_service_prepared_has_no_links_out(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside")
    linked = make(tmp_path / "prepared" / "org--linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(outside / "model.safetensors")
    assert ids(models_of(prepared_dir=tmp_path / "prepared")) == []


def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "tokenizer_config.json").symlink_to("/dev/zero")
    (folder / "README.md").symlink_to(tmp_path / "nothing")
    models = models_of(tmp_path)
    details = models.details(models.all()[0])
    assert details.chat_template is False
    assert [file.path for file in details.files] == ["config.json", "model.safetensors"]


def test_a_link_within_a_model_is_followed(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert ids(models_of(tmp_path)) == ["m"]


def test_the_hubs_cache_is_read_at_main(tmp_path: Path) -> None:
    cache = tmp_path / "hub-cache"
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS, "vocab.txt": b"a"}
    with HubDouble() as hub:
        main = hub.add_model("org/m", files)
        hub.add_model("org/m", files | {"x.txt": b"x"}, revision="dev")
        for revision in (None, "dev"):
            snapshot_download("org/m", revision=revision, endpoint=hub.url, cache_dir=cache)
        hub.add_model("org/partial", files)
        snapshot_download("org/partial", endpoint=hub.url, cache_dir=cache, allow_patterns=["config.json"])
    models = models_of(hub_cache_dir=lambda: cache)
    (model,) = models.all()

    assert (model.model_id, model.revision) == ("org/m", main)
    assert model.path is not None
    assert model.path.is_relative_to(cache)
    details = models.details(model)
    assert (details.sha, details.config, details.summary.parameters) == (main, CONFIG, 17)
    assert [file.path for file in details.files] == sorted(files)


def test_a_cached_blob_that_was_truncated_is_no_model(tmp_path: Path) -> None:
    with HubDouble() as hub:
        hub.add_model("org/m", CACHED)
        folder = Path(snapshot_download("org/m", endpoint=hub.url, cache_dir=tmp_path))
    blob = (folder / "model.safetensors").resolve()
    os.truncate(blob, len(WEIGHTS) - 4)
    assert ids(models_of(hub_cache_dir=lambda: tmp_path)) == []


SHARDS = {f"model-0000{number}-of-00002.safetensors": WEIGHTS for number in (1, 2)}
INDEX = {"model.safetensors.index.json": b"{}"}


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        ({"config.json": b"{}", "model.safetensors": WEIGHTS}, "tokenizer"),
        ({"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer_config.json": b"{}"}, "tokenizer"),
        ({"config.json": b"{}", **SHARDS, "vocab.json": b"{}"}, "index of shards"),
        ({"config.json": b"{}", "tokenizer.json": b"{}"}, "safetensors weights"),
        ({"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.model": b"x"}, None),
        ({"config.json": b"{}", "model.safetensors": WEIGHTS, "vocab.json": b"{}", "merges.txt": b""}, None),
        ({"config.json": b"{}", **SHARDS, **INDEX, "qwen.tiktoken": b"x"}, None),
    ],
)
def test_what_the_cache_holds_in_part_is_no_model_and_says_what_is_missing(
    tmp_path: Path, files: dict[str, bytes], lacking: str | None
) -> None:
    with HubDouble() as hub:
        commit = hub.add_model("org/m", files)
        snapshot_download("org/m", endpoint=hub.url, cache_dir=tmp_path)
    models = models_of(hub_cache_dir=lambda: tmp_path)
    assert ids(models) == ([] if lacking else ["org/m"])
    for revision in (None, "main", commit):
        missing = models.lacking("org/m", revision)
        assert len(missing) == (1 if lacking else 0)
        assert lacking is None or lacking in missing[0]
    assert models.lacking("org/absent", None) == models.lacking("org/m", "other") == ()


def test_a_link_out_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(WEIGHTS)
    with HubDouble() as hub:
        hub.add_model("org/m", CACHED)
        folder = Path(snapshot_download("org/m", endpoint=hub.url, cache_dir=tmp_path / "cache"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)
    assert ids(models_of(hub_cache_dir=lambda: tmp_path / "cache")) == []


def test_folders_that_are_not_there_hold_no_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    absent = tmp_path / "absent"
    models = models_of(absent, tmp_path / "file", prepared_dir=absent, hub_cache_dir=lambda: absent)
    assert models.all() == ()


def test_the_operators_folder_comes_before_other_copies(tmp_path: Path) -> None:
    own = make(tmp_path / "own" / "org" / "m")
    prepared = make(tmp_path / "prepared" / "org--m")
    make(tmp_path / "prepared" / "org--n")
    embedded = LocalModel("org/m", None, ModelSummary("org/m"), None, CONFIG)
    later = LocalModel("org/z", None, ModelSummary("org/z"), None, CONFIG)

    def found(*roots: Path, model: LocalModel = embedded, **more: Any) -> dict[str, Path | None]:
        models = models_of(*roots, embedded=lambda: model, **more)
        return {item.model_id: item.path for item in models.all()}

    assert found(tmp_path / "own", prepared_dir=tmp_path / "prepared")["org/m"] == own
    assert found(prepared_dir=tmp_path / "prepared")["org/m"] == prepared
    assert list(found(prepared_dir=tmp_path / "prepared", model=later)) == ["org/m", "org/n", "org/z"]
    assert found() == {"org/m": None}


def test_an_embedded_model_is_described_before_it_is_prepared() -> None:
    embedded = LocalModel("org/m", None, ModelSummary("org/m", parameters=3), None, CONFIG)
    models = models_of(embedded=lambda: embedded)
    model = models.find("org/m")

    assert model is not None
    assert model.summary.local
    details = models.details(model)
    assert (details.config, details.files, details.parameters_by_dtype) == (CONFIG, (), None)
    assert (details.chat_template, details.summary.parameters) == (None, 3)


def test_finding_one_is_looking_through_all(tmp_path: Path) -> None:
    cache = tmp_path / "hub-cache"
    with HubDouble() as hub:
        for name in ("org/m", "org/cached", "cached"):
            commit = hub.add_model(name, CACHED)
            snapshot_download(name, endpoint=hub.url, cache_dir=cache)
    for folder in ("own/plain", "own/org/m", "own/model/inner", "own/.hidden", "own/org/.hidden", "outside/linked"):
        make(tmp_path / folder)
    (tmp_path / "own" / "model" / "config.json").write_text("{}")  # now the outer folder is one, without weights
    (tmp_path / "own" / "linked").symlink_to(tmp_path / "outside" / "linked")
    for folder in ("prepared/org--m", "prepared/org--prepared", "prepared/simple"):
        make(tmp_path / folder)
    embedded = LocalModel("org/embedded", None, ModelSummary("org/embedded"), None, CONFIG)
    models = models_of(
        tmp_path / "own", prepared_dir=tmp_path / "prepared", hub_cache_dir=lambda: cache, embedded=lambda: embedded
    )
    known = {model.model_id: model for model in models.all()}
    asked = (*known, "linked", "model", "model/inner", ".hidden", "org/.hidden", "outside/linked", "org", "a--b", "..")

    assert {name: models.find(name) for name in asked} == {name: known.get(name) for name in asked}
    assert {"plain", "org/m", "org/prepared", "simple", "org/cached", "cached", "org/embedded", "linked"} == set(known)
    assert models.find("cached", commit) == known["cached"]
    assert models.find("cached", "0" * 40) is None
    assert models.find("plain", commit) is None


def test_a_branch_is_the_commit_that_it_was_at_when_it_was_fetched(tmp_path: Path) -> None:
    cache = tmp_path / "hub-cache"
    with HubDouble() as hub:
        commits = {}
        for branch in ("main", "team/dev"):
            commits[branch] = hub.add_model("org/m", CACHED | {"x.txt": branch.encode()}, revision=branch)
            snapshot_download("org/m", revision=branch, endpoint=hub.url, cache_dir=cache)
    models = models_of(hub_cache_dir=lambda: cache)
    (cache / "models--org--m" / "refs" / "odd").write_bytes(b"\xff")
    (cache / "models--org--m" / "refs" / "word").write_text("main")
    outside = tmp_path / "outside"
    outside.write_text(commits["main"])
    (cache / "models--org--m" / "refs" / "linked").symlink_to(outside)

    found = {branch: models.find_last("org/m", branch) for branch in commits}
    assert {branch: model and model.revision for branch, model in found.items()} == commits
    for revision in ("absent", "odd", "word", "linked", "team", "main/x", "../../../outside", str(outside), "a\0", ""):
        assert models.find_last("org/m", revision) is None
        assert commit_at(cache / "models--org--m", revision) is None
    assert models.find_last("../org/m", "main") is None
    assert models_of().find_last("org/m", "main") is None


@pytest.mark.parametrize(
    ("change", "matches"),
    [
        ({}, True),
        ({"query": "ORG/m"}, True),
        ({"query": "other"}, False),
        ({"task": "fill-mask"}, False),
        ({"task": None}, True),
        ({"author": "org"}, True),
        ({"author": "o"}, False),
        ({"library": "transformers"}, True),
        ({"license": "mit"}, False),
        ({"gated": False}, False),
        ({"tags": ("x",)}, False),
        ({"min_parameters": 17, "max_parameters": 17}, True),
        ({"min_parameters": 18}, False),
        ({"max_parameters": 16}, False),
    ],
)
def test_a_search_matches_what_is_known(tmp_path: Path, change: dict[str, Any], matches: bool) -> None:
    make(tmp_path / "org" / "m")
    assert bool(models_of(tmp_path).search(SearchQuery(**change))) is matches


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    models = models_of(tmp_path)
    before = models.all()[0].summary.parameters
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"a": ("I8", (100,))}))
    assert (before, models.all()[0].summary.parameters) == (17, 100)


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (
            ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["model-00001-of-00002.safetensors"], []),
        (["original/model.safetensors", "adapter_model.safetensors", "x.bin"], []),
        (["weights.safetensors"], ["weights.safetensors"]),
    ],
)
def test_the_weights_that_a_load_reads(paths: list[str], chosen: list[str]) -> None:
    assert list(weight_files(paths)) == chosen
