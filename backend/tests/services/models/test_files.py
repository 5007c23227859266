import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download, snapshot_download

from core import errors
from domain.models.gguf import CONVERSION, GGUF_CONVERSION
from services.hub.cache_dir import HubCacheDir
from services.hub.client import HubClient
from services.hub.downloads import Downloads
from services.hub.http import HubHttp
from services.models.embedded import MODEL_ID, EmbeddedModel
from services.models.files import ModelFiles
from services.models.pickled import PickledModels
from services.models.progress import LoadProgress
from tests.support.hub_double import HubDouble, ManualClock, quiet_environment, safetensors_bytes
from tests.support.registries import make_registry

WEIGHTS = safetensors_bytes({"w": ("BF16", (64, 64))})
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}


class Bench:
    """Model files on a double, with a cache of their own."""

    def __init__(self, hub: HubDouble, folder: Path) -> None:
        self.hub, self.root, self.folder = hub, folder / "hub-cache", folder
        clock = ManualClock()
        http = HubHttp(clock, clock.sleep, endpoint=hub.url)
        client = HubClient(http)
        self.registry = make_registry(hub, folder, clock, hub_cache_dir=lambda: self.root)
        cache = HubCacheDir(lambda: self.root, folder / "verified")
        embedded = EmbeddedModel(folder / "studio", folder / "logs")
        downloads = Downloads(http, client, cache, clock, clock.sleep)
        pickled = PickledModels(folder / "studio", folder / "logs")
        self.files = ModelFiles(embedded, self.registry, downloads, pickled)
        self.progress: list[tuple[str, LoadProgress]] = []

    def ensure(self, model_id: str, revision: str | None = None) -> Path:
        return self.files.ensure(model_id, revision, lambda state, progress: self.progress.append((state, progress)))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    quiet_environment(monkeypatch, tmp_path)
    with HubDouble() as hub:
        yield Bench(hub, tmp_path)


def test_a_model_is_downloaded_once_and_then_found(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    first = bench.ensure("me/m")
    before = bench.hub.requests.total()

    assert bench.ensure("me/m") == first
    assert bench.hub.requests.total() == before
    assert bench.progress[0] == ("downloading", LoadProgress())
    state, last = bench.progress[-1]
    total = sum(map(len, FILES.values()))
    assert (state, last.fraction, last.downloaded_bytes, last.total_bytes) == ("downloading", 1.0, total, total)


def test_the_operators_folder_is_used_without_asking_the_hub(bench: Bench) -> None:
    folder = bench.folder / "models" / "me" / "m"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    bench.files.check("me/m", None)

    assert bench.ensure("me/m") == folder
    assert (bench.hub.requests.total(), bench.progress) == (0, [])


def test_a_damaged_blob_is_mended_at_the_commit_that_was_here(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    folder = bench.ensure("me/m")
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"\x01")
    bench.hub.add_model("me/m", FILES | {"config.json": b'{"model_type": "newer"}'})  # main has moved on

    assert bench.ensure("me/m") == folder
    assert blob.read_bytes() == WEIGHTS


def test_a_damaged_blob_that_cannot_be_mended_is_not_loaded(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES)
    blob = (bench.ensure("me/m") / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"\x01")
    for route in ("info", "tree", "resolve", "cdn"):
        bench.hub.fail(route, status=503, times=99)
    with pytest.raises(errors.HubUnavailable):
        bench.ensure("me/m")


def test_a_gated_model_that_the_hub_has_disabled_asks_nobody_for_a_licence(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, gated="auto", disabled=True)
    with pytest.raises(errors.AccessDenied, match="disabled by the Hub") as caught:
        bench.files.check("me/m", None)
    assert not isinstance(caught.value, errors.ModelGated)


def test_a_pinned_commit_beside_main_is_found(bench: Bench) -> None:
    old = bench.hub.add_model("me/m", FILES)
    pinned = bench.ensure("me/m", old)
    bench.hub.add_model("me/m", FILES | {"config.json": b'{"model_type": "newer"}'})
    bench.ensure("me/m", "main")
    before = bench.hub.requests.total()

    assert bench.ensure("me/m", old) == pinned
    bench.files.check("me/m", old)
    assert bench.hub.requests.total() == before


@pytest.fixture
def partly(bench: Bench) -> str:
    """Leave config and weights of a model in the cache, as other programs do. Returns the commit."""
    commit = bench.hub.add_model("me/m", FILES | {"tokenizer_config.json": b"{}"})
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("me/m", name, endpoint=bench.hub.url, cache_dir=bench.root)
    return commit


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_folder_without_a_tokenizer_is_completed(bench: Bench, partly: str, pinned: bool, kind: str) -> None:
    revision = partly if pinned else None
    fetched = bench.hub.requests["cdn"]
    for _ in range(2):
        bench.files.check("me/m", revision)
        ensure = bench.ensure if kind == "model" else bench.files.ensure_tokenizer
        folder = ensure("me/m", revision)
        before = bench.hub.requests.total()

    assert folder == bench.root / "models--me--m" / "snapshots" / partly
    assert {path.name for path in folder.iterdir()} == {*FILES, "tokenizer_config.json"}
    assert bench.hub.requests["cdn"] == fetched  # the weights that were there are not fetched again
    ensure("me/m", revision)
    assert bench.hub.requests.total() == before
    assert bench.registry.resolve_local("me/m", revision) is not None


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("away", ["offline", "unreachable"])
def test_a_folder_that_cannot_be_completed_says_what_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, partly: str, away: str, pinned: bool
) -> None:
    if away == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for route in ("info", "tree"):
        bench.hub.fail(route, status=503, headers={"Retry-After": "60"}, times=99)
    revision = partly if pinned else None
    for ask in (
        lambda: bench.files.check("me/m", revision),
        lambda: bench.ensure("me/m", revision),
        lambda: bench.files.ensure_tokenizer("me/m", revision),
        lambda: bench.registry.details("me/m", revision),
    ):
        with pytest.raises(errors.HubUnavailable, match=r"me/m is on .* only in part, without its tokenizer") as caught:
            ask()
        assert caught.value.extras == ({} if away == "offline" else {"retry_after_s": 60.0})
    assert bench.registry.resolve_local("me/m", revision) is None


@pytest.mark.parametrize("away", ["offline", "unreachable"])
def test_a_branch_that_is_here_is_known_and_loaded_while_the_hub_is_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    commit = bench.hub.add_model("me/m", FILES)
    bench.hub.add_model("me/m", FILES | {"x.txt": b"x"}, revision="team/dev")
    folders = {
        branch: Path(snapshot_download("me/m", revision=branch, endpoint=bench.hub.url, cache_dir=bench.root))
        for branch in ("main", "team/dev")
    }
    if away == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for route in ("info", "tree", "resolve", "cdn"):
        bench.hub.fail(route, status=503, times=99)

    details = bench.registry.details("me/m", "main").details
    assert (details.sha, details.revision, details.summary.local) == (commit, "main", True)
    assert bench.registry.blockers_of("me/m", "main") == []
    for branch, folder in folders.items():
        assert bench.registry.config_of("me/m", branch) == {"model_type": "llama"}
        bench.files.check("me/m", branch)
        assert bench.ensure("me/m", branch) == folder
    with pytest.raises(errors.HubUnavailable):
        bench.files.check("me/m", "other")


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"config.json": b'{"auto_map": {"AutoModel": "x.Y"}}'}, errors.NeedsRemoteCode),
        ({"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": "x.Y"}}'}, errors.NeedsRemoteCode),
        ({"config.json": b'{"attn_implementation": "someone/kernel"}'}, errors.NeedsRemoteCode),
        ({"config.json": b'{"n_layer": 10000000}'}, errors.ModelRejected),
        ({"model.safetensors": None}, errors.NoSafeWeights),
        ({"model.safetensors": None, "model-00001-of-00002.safetensors": WEIGHTS}, errors.NoSafeWeights),
    ],
)
@pytest.mark.parametrize("here", [True, False])
def test_what_may_not_be_loaded_is_refused_before_and_after(
    bench: Bench, here: bool, files: dict[str, Any], error: type[errors.StudioError]
) -> None:
    content = {name: data for name, data in (FILES | files).items() if data is not None}
    if here and "model.safetensors" in content:
        folder = bench.folder / "models" / "me" / "m"
        folder.mkdir(parents=True)
        for name, data in content.items():
            (folder / name).write_bytes(data)
    else:
        bench.hub.add_model("me/m", content)
    for refuse in (lambda: bench.files.check("me/m", None), lambda: bench.ensure("me/m")):
        with pytest.raises(error):
            refuse()
    assert bench.hub.requests["cdn"] == 0


@pytest.mark.parametrize("weights", [b"\xff" * 64, WEIGHTS[:-1], WEIGHTS + b"x", b""])
def test_weights_that_the_hub_itself_holds_broken_are_refused(bench: Bench, weights: bytes) -> None:
    bench.hub.add_model("me/m", FILES | {"model.safetensors": weights})
    with pytest.raises(errors.ModelRejected, match=r"model\.safetensors is broken"):
        bench.ensure("me/m")


def test_a_gated_model_is_refused_at_once(bench: Bench) -> None:
    bench.hub.add_model("me/m", FILES, gated="auto")
    with pytest.raises(errors.ModelGated):
        bench.files.check("me/m", None)


def test_the_embedded_model_asks_nobody(bench: Bench) -> None:
    bench.files.check(MODEL_ID, None)
    folder = bench.folder / "studio" / "models" / MODEL_ID.replace("/", "--")
    folder.mkdir(parents=True)
    made = {CONVERSION: json.dumps({"version": GGUF_CONVERSION}).encode()}
    for name, data in (FILES | made).items():
        (folder / name).write_bytes(data)
    (folder / CONVERSION).write_text(json.dumps({"version": GGUF_CONVERSION}))
    assert bench.ensure(MODEL_ID) == folder
    assert bench.hub.requests.total() == 0


def test_its_config_is_what_the_hub_says_of_a_revision(bench: Bench) -> None:
    commit = bench.hub.add_model("me/m", FILES, revision="dev")
    bench.hub.add_model("me/m", FILES | {"config.json": json.dumps({"auto_map": {"a": "b"}}).encode()})
    bench.files.check("me/m", "dev")
    bench.files.check("me/m", commit)
    with pytest.raises(errors.NeedsRemoteCode):
        bench.files.check("me/m", "main")


def test_pickled_weights_at_a_revision_are_refused(bench: Bench) -> None:
    with pytest.raises(errors.SettingRejected, match="allow_pickle"):
        bench.files.check("me/m", "main", allow_pickle=True)


def test_no_leave_helps_where_there_are_no_weights_at_all(bench: Bench) -> None:
    bench.hub.add_model("me/m", {"config.json": b"{}", "model.gguf": b"x"})
    with pytest.raises(errors.NoSafeWeights):
        bench.files.check("me/m", None, allow_pickle=True)
