"""Adapters from elsewhere through a real server: what is sound is served, what is not is refused and never runs."""

import io
import json
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_exports_api import finished, train
from tests.support.adapter_double import adapter_files, adapter_tensors, malicious_pickle, write_files, zip_of
from tests.support.hub_double import HubDouble, safetensors_bytes
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
HEADER = {"X-HF-Token": "hf_valid"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubDouble]:
    with HubDouble() as double:
        yield double


@pytest.fixture(scope="module")
def studio(hub: HubDouble, model_dirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    home = tmp_path_factory.mktemp("data")
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": ""}
    with start_server(home, model_dirs, PEFT_STUDIO_MAX_UPLOAD_BYTES=str(4 * 2**20), **environment) as server:
        yield server


@pytest.fixture
def inbox(studio: StudioServer) -> Iterator[Path]:
    """A folder below the data directory."""
    folder = studio.home / "inbox"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def bring(studio: StudioServer, **body: Any) -> httpx.Response:
    return studio.http.post("/api/adapters", json=body)


def upload(studio: StudioServer, content: bytes, filename: str = "mine.zip", **form: str) -> httpx.Response:
    return studio.http.post("/api/adapters", files={"file": (filename, content)}, data=form)


def stored(studio: StudioServer) -> list[str]:
    return sorted(path.name for path in (studio.home / "adapters").iterdir())


def ids(studio: StudioServer) -> list[str]:
    return sorted(entry["id"] for entry in studio.http.get("/api/adapters").json()["adapters"])


def test_an_adapter_goes_out_and_comes_in_again_and_is_the_same(studio: StudioServer, inbox: Path) -> None:
    trained = studio.http.get(f"/api/adapters/{train(studio)}").json()
    content = studio.http.get(f"/api/adapters/{trained['id']}/download").content
    zipped = upload(studio, content, name="again")
    assert zipped.status_code == 201, zipped.text
    again = zipped.json()
    for name in ("base_model_id", "config", "algorithm"):
        assert again[name] == trained[name], name
    assert again["metrics"]["final_loss"] == trained["metrics"]["final_loss"]
    assert (again["name"], again["version"], again["job_id"]) == ("again", 1, None)
    assert again["source"] == {"kind": "upload", "filename": "mine.zip"}
    assert studio.adapter_weights(again["id"]) == studio.adapter_weights(trained["id"])
    words = shlex.split(trained["vllm"]["command"])  # how vLLM serves it: as the name that /v1 has for it
    assert (
        words[:2] == ["vllm", "serve"]
        and Path(words[2]).name == TINY_ID.partition("/")[2]
        and trained["path"] in words[5]
    )
    assert words[5].split("=")[0] in [model["id"] for model in studio.http.get("/v1/models").json()["data"]]
    assert Path(words[words.index("--chat-template") + 1]).is_file() and trained["vllm"]["why_not"] is None

    folder = bring(studio, path=trained["path"], name="again")
    assert folder.status_code == 201, folder.text
    assert folder.json()["version"] == 2 and folder.json()["source"] == {"kind": "folder", "path": trained["path"]}

    loaded = studio.load(TINY_ID)
    answers = {
        studio.generate(loaded["id"], "say 3 twice", adapter)["text"]
        for adapter in (trained["id"], again["id"], folder.json()["id"])
    }
    assert len(answers) == 1
    done = finished(
        studio, studio.http.post(f"/api/adapters/{again['id']}/export", json={"format": "merged"}).json()["id"]
    )
    assert done["state"] == "succeeded", done

    damaged = dict(_members(content))
    damaged["adapter_model.safetensors"] = damaged["adapter_model.safetensors"][:-1] + b"\1"
    refused = upload(studio, zip_of(damaged))
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/adapter-rejected")
    assert "sha256" in refused.json()["detail"]
    for adapter in (again["id"], folder.json()["id"]):
        assert studio.http.delete(f"/api/adapters/{adapter}").status_code == 204
    studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}")


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_an_adapter_of_another_tool_is_served_and_its_patterns_are_not(studio: StudioServer, inbox: Path) -> None:
    pattern = r".*\.(q_proj|v_proj)"
    files = adapter_files(base_model_name_or_path="/home/someone/llama", target_modules=pattern, use_rslora=True)
    write_files(inbox, files | {"modeling_evil.py": b"raise SystemExit"})
    refused = bring(studio, path=str(inbox))
    assert refused.status_code == 422 and "base_model_id" in refused.json()["detail"]
    taken = bring(studio, path=str(inbox), base_model_id=TINY_ID)
    assert taken.status_code == 201, taken.text
    details = taken.json()
    assert (details["algorithm"], details["config"], details["dataset_sha256"]) == ("rslora", None, None)
    assert set(details["source"]["rewritten"]) == {"base_model_name_or_path", "target_modules"}
    assert "modeling_evil.py" not in [file["name"] for file in details["files"]]
    loaded = studio.load(TINY_ID)
    studio.generate(loaded["id"], "say 3 twice", details["id"])
    done = finished(
        studio, studio.http.post(f"/api/adapters/{details['id']}/export", json={"format": "merged"}).json()["id"]
    )
    assert done["state"] == "succeeded" and done["result"]["adapted_layers"] == 4, done
    studio.http.delete(f"/api/adapters/{details['id']}")
    studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}")


LLAMA = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}


@pytest.mark.parametrize(
    ("settings", "rewritten", "warned"),
    [
        ({"auto_mapping": LLAMA | {"unsloth_fixed": True}}, ["auto_mapping"], ["unsloth_fixed"]),
        (
            {"lorap_emb_lr": 1e-06, "lora_dtype": "bfloat16"},
            ["lora_dtype", "lorap_emb_lr"],
            ["lora_dtype, lorap_emb_lr"],
        ),
        ({"lora_alpha": 12.5, "alpha_pattern": {"v_proj": 22.5}}, [], []),
        (
            {"alpha_pattern": {r"layers\.0\..*_proj": 0.5}, "rank_pattern": {r"q_proj|v_proj": 4}},
            ["alpha_pattern", "rank_pattern"],
            [],
        ),
    ],
    ids=["unsloth", "ms-swift", "fractions", "expressions"],
)
def test_the_forms_of_other_tools_are_served(
    studio: StudioServer, settings: dict[str, Any], rewritten: list[str], warned: list[str]
) -> None:
    taken = upload(studio, zip_of(adapter_files(**settings)))
    assert taken.status_code == 201, taken.text
    adapter = taken.json()
    assert adapter["source"].get("rewritten", []) == rewritten
    assert [words in warning for words, warning in zip(warned, adapter["warnings"], strict=True)] == [True] * len(
        warned
    )
    listed = studio.http.get("/api/adapters").json()["adapters"]
    assert [entry["warnings"] for entry in listed if entry["id"] == adapter["id"]] == [adapter["warnings"]]
    loaded = studio.load(TINY_ID)
    assert studio.generate(loaded["id"], "say 3 twice", adapter["id"])["adapter_id"] == adapter["id"]
    studio.http.delete(f"/api/adapters/{adapter['id']}")
    studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}")


def renamed(old: str, new: str) -> dict[str, bytes]:
    tensors = {name.replace(old, new): value for name, value in adapter_tensors().items()}
    return adapter_files() | {"adapter_model.safetensors": safetensors_bytes(tensors)}


def without(words: str, **settings: Any) -> dict[str, bytes]:
    tensors = {name: value for name, value in adapter_tensors().items() if words not in name}
    return adapter_files(**settings) | {"adapter_model.safetensors": safetensors_bytes(tensors)}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            renamed("model.model.model.", "model.model."),
            "no layer of that name, as it has model.layers.0.self_attn.q_proj",
        ),
        (renamed("model.model.model.", "model.model.model.model."), "no layer of that name"),
        (renamed("base_model.model.", ""), "begin with base_model.model."),
        (renamed("base_model.model.", "module."), "begin with base_model.model."),
        (renamed("lora_A.", "lora_A.default."), "the adapter's name"),
        (renamed("layers.1.", "layers.2."), "model.layers.2.self_attn.q_proj"),
        (without("layers.1."), "its settings name model.layers.1.self_attn.q_proj and one more layer"),
        (without("layers.0.self_attn.v_proj"), "its settings name model.layers.0.self_attn.v_proj,"),
        (without("layers.1.", target_modules=r".*\.[qv]_proj"), "its settings name model.layers.1."),
        (without("v_proj"), "its settings name model.layers.0.self_attn.v_proj and one more layer"),
        (
            adapter_files()
            | {"adapter_model.safetensors": safetensors_bytes(adapter_tensors(shapes={"q_proj": (32, 64)}))},
            "takes 32 features and gives 64, and the base's takes 64",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused_at_the_door(
    studio: StudioServer, files: dict[str, bytes], words: str
) -> None:
    before = stored(studio)
    refused = upload(studio, zip_of(files))
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/adapter-rejected"), refused.text
    assert words in refused.json()["detail"] and stored(studio) == before


def test_an_adapter_on_some_of_the_layers_is_served_and_one_of_a_base_that_is_not_known_is_kept(
    studio: StudioServer,
) -> None:
    taken = upload(studio, zip_of(without("layers.1.", layers_to_transform=[0])))
    assert taken.status_code == 201, taken.text
    loaded = studio.load(TINY_ID)
    studio.generate(loaded["id"], "say 3 twice", taken.json()["id"])
    studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}")
    elsewhere = upload(studio, zip_of(without("layers.1.")), base_model_id="nobody/knows-it")
    assert elsewhere.status_code == 201, elsewhere.text
    for adapter in (taken, elsewhere):
        studio.http.delete(f"/api/adapters/{adapter.json()['id']}")


def test_a_zip_made_by_the_macos_finder_is_taken_and_one_with_two_adapters_is_not(studio: StudioServer) -> None:
    files = {f"my adapter/{name}": content for name, content in adapter_files().items()}
    litter = {"__MACOSX/my adapter/._adapter_config.json": b"\0\5\x16\7", "my adapter/.DS_Store": b"\0"}
    taken = upload(studio, zip_of(files | litter), "my adapter.zip")
    assert taken.status_code == 201, taken.text
    assert {file["name"] for file in taken.json()["files"]} == {*adapter_files(), "manifest.json"}
    studio.http.delete(f"/api/adapters/{taken.json()['id']}")
    before = stored(studio)
    refused = upload(studio, zip_of(files | {f"other/{name}": content for name, content in adapter_files().items()}))
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/adapter-rejected")
    assert "my adapter, other" in refused.json()["detail"] and stored(studio) == before


def test_an_adapter_that_was_trained_here_through_unsloth_comes_back_in(studio: StudioServer) -> None:
    content = studio.http.get(f"/api/adapters/{train(studio)}/download").content
    files = {name: data for name, data in _members(content).items() if name != "manifest.json"}
    # As Unsloth leaves it in the adapter that it trains: unsloth_zoo/hf_utils.py, fix_lora_auto_mapping.
    settings = json.loads(files["adapter_config.json"]) | {"auto_mapping": LLAMA | {"unsloth_fixed": True}}
    taken = upload(studio, zip_of(files | {"adapter_config.json": json.dumps(settings).encode()}))
    assert taken.status_code == 201, taken.text
    assert "unsloth_fixed" in taken.json()["warnings"][0]


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_files(folder, adapter_files(**changes))

    return change


def file(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Write or remove a file of a sound adapter."""

    def spoil(folder: Path) -> None:
        write_files(folder, adapter_files())
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            write_files(folder, {name: content})

    return spoil


def pickled(name: str, *removed: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        write_files(folder, adapter_files() | {name: malicious_pickle(folder.parent / "canary")})
        for other in removed:
            (folder / other).unlink()

    return spoil


def weights(**changes: Any) -> bytes:
    return safetensors_bytes(adapter_tensors() | changes)


def spoiled_header(old: bytes, new: bytes) -> bytes:
    content = weights()
    assert content.count(old) >= 1 and len(old) == len(new)
    return content.replace(old, new, 1)


SOUND = weights()
HOSTILE: list[tuple[str, Callable[[Path], None], int, str]] = [
    # HARDENING A 14, 15
    ("bin only", pickled("adapter_model.bin", "adapter_model.safetensors"), 409, "no-safe-weights"),
    ("bin beside", pickled("adapter_model.bin"), 422, "adapter-rejected"),
    ("optimizer", pickled("optimizer.pt"), 422, "adapter-rejected"),
    ("rng", pickled("rng_state.pth"), 422, "adapter-rejected"),
    ("arguments", pickled("training_args.bin"), 422, "adapter-rejected"),
    ("deep", pickled("checkpoint-9/scheduler.pt"), 422, "adapter-rejected"),
    # 16, 17
    ("kernel", config(attn_implementation="someone/kernel"), 409, "needs-remote-code"),
    ("auto_map", file("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": "x.Y"}}'), 409, "needs-remote-code"),
    # 19
    ("os.system", config(auto_mapping={"base_model_class": "system", "parent_library": "os"}), 422, "adapter-rejected"),
    ("megatron", config(megatron_config={"a": 1}, megatron_core="os"), 422, "adapter-rejected"),
    ("corda", config(corda_config={"cache_file": "x.pt"}), 422, "adapter-rejected"),
    # 23
    ("header", file("adapter_model.safetensors", b"\xff" * 64), 422, "adapter-rejected"),
    ("header length", file("adapter_model.safetensors", b"\xff" * 7 + b"\x7f{}"), 422, "adapter-rejected"),
    ("truncated", file("adapter_model.safetensors", SOUND[:-1]), 422, "adapter-rejected"),
    ("too long", file("adapter_model.safetensors", SOUND + b"x"), 422, "adapter-rejected"),
    (
        "overlap",
        file("adapter_model.safetensors", spoiled_header(b"[1024, 2048]", b"[   0, 1024]")),
        422,
        "adapter-rejected",
    ),
    ("empty", file("adapter_model.safetensors", b""), 422, "adapter-rejected"),
    # and what else a folder can be
    ("no config", file("adapter_config.json", None), 422, "adapter-rejected"),
    ("config no JSON", file("adapter_config.json", b"{"), 422, "adapter-rejected"),
    ("config NaN", file("adapter_config.json", b'{"lora_alpha": NaN}'), 422, "adapter-rejected"),
    ("config deep", file("adapter_config.json", b"[" * 5000 + b"]" * 5000), 422, "adapter-rejected"),
    ("config large", file("adapter_config.json", b" " * (2 * 2**20)), 422, "adapter-rejected"),
    ("pissa", config(init_lora_weights="pissa"), 422, "adapter-rejected"),
    ("too large", file("README.md", bytes(5 * 2**20)), 413, "too-large"),
]


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(("spoil", "status", "slug"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_hostile_adapter_is_refused_with_no_side_effect(
    studio: StudioServer, inbox: Path, spoil: Callable[[Path], None], status: int, slug: str, as_zip: bool
) -> None:
    folder = inbox / "it"
    spoil(folder)
    before, engines = (stored(studio), ids(studio)), studio.engines()
    if as_zip:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        response = upload(studio, zip_of(files))
    else:
        response = bring(studio, path=str(folder))
    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{slug}"), response.text
    assert (stored(studio), ids(studio)) == before and studio.engines() == engines
    assert not (inbox / "canary").exists()


def test_paths_and_links_that_leave_are_forbidden(studio: StudioServer, inbox: Path, tmp_path: Path) -> None:
    outside = write_files(studio.home.parent / f"{studio.home.name}-evil", adapter_files())
    sound = write_files(inbox / "it", adapter_files())
    (inbox / "link").symlink_to(outside)
    before = stored(studio)
    for path in (outside, tmp_path / "none", "/etc/passwd", inbox / "link", f"{inbox}/../../{outside.name}", "it"):
        response = bring(studio, path=str(path))
        assert (response.status_code, response.json()["type"]) == (403, "/problems/path-not-allowed"), response.text
    (sound / "tokenizer.json").symlink_to("/etc/passwd")
    response = bring(studio, path=str(sound))
    assert (response.status_code, response.json()["type"]) == (403, "/problems/path-not-allowed"), response.text
    assert stored(studio) == before and "root:" not in response.text
    shutil.rmtree(outside)


def test_a_base_that_asks_for_code_is_refused_with_its_adapter(
    studio: StudioServer, hub: HubDouble, inbox: Path
) -> None:
    files = {"config.json": json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}).encode()}
    hub.add_model("evil/base", files | {"model.safetensors": safetensors_bytes({"w": ("F32", (1,))})})
    write_files(inbox / "it", adapter_files(base_model_name_or_path="evil/base"))
    response = bring(studio, path=str(inbox / "it"))
    assert (response.status_code, response.json()["type"]) == (409, "/problems/needs-remote-code")
    write_files(inbox / "it", adapter_files(base_model_name_or_path="nobody/knows"))
    response = bring(studio, path=str(inbox / "it"))
    assert response.status_code == 201, response.text
    studio.http.delete(f"/api/adapters/{response.json()['id']}")


def test_an_adapter_of_the_hub_is_fetched_without_the_pickles_beside_it(studio: StudioServer, hub: HubDouble) -> None:
    files = adapter_files() | {"training_args.bin": b"pickle", "optimizer.pt": b"pickle", "checkpoint-1/x.bin": b"p"}
    commit = hub.add_model("me/adapter", files)
    response = bring(studio, hub_id="me/adapter", name="from the hub")
    assert response.status_code == 201, response.text
    details = response.json()
    assert details["source"] == {"kind": "hub", "model_id": "me/adapter", "revision": None, "commit": commit}
    assert {file["name"] for file in details["files"]} == {*adapter_files(), "manifest.json"}
    fetched = [seen.path for seen in hub.seen if seen.route == "resolve"]
    assert not [path for path in fetched if path.endswith((".bin", ".pt"))]
    studio.http.delete(f"/api/adapters/{details['id']}")

    for name, spoiled, status, slug in (
        ("bin", {"adapter_config.json": b"{}", "adapter_model.bin": b"p"}, 409, "no-safe-weights"),
        ("model", {"config.json": b"{}", "model.safetensors": SOUND}, 422, "adapter-rejected"),
        ("code", adapter_files() | {"tokenizer_config.json": b'{"auto_map": {"a": "b"}}'}, 409, "needs-remote-code"),
    ):
        hub.add_model(f"evil/{name}", spoiled)
        before, cdn = stored(studio), hub.requests["cdn"]
        response = bring(studio, hub_id=f"evil/{name}")
        assert (response.status_code, response.json()["type"]) == (status, f"/problems/{slug}"), response.text
        assert stored(studio) == before and hub.requests["cdn"] == cdn  # refused before the weights
    hub.add_model("evil/paths", adapter_files())
    hub.lie_about_tree("evil/paths", {"type": "file", "path": "../../x", "oid": "0" * 40, "size": 1})
    assert bring(studio, hub_id="evil/paths").json()["type"] == "/problems/model-rejected"
    assert bring(studio, hub_id="nobody/nothing").status_code == 404
    hub.add_model("me/private", adapter_files(), private=True)
    assert bring(studio, hub_id="me/private").status_code == 404
    private = studio.http.post("/api/adapters", json={"hub_id": "me/private"}, headers=HEADER)
    assert private.status_code == 201, private.text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"path": "/x", "hub_id": "a/b"},
        {"path": ""},
        {"path": 3},
        {"hub_id": "a/b/c"},
        {"hub_id": "../../etc"},
        {"path": "/x", "revision": "main"},
        {"path": "/x", "trust_remote_code": True},
        {"hub_id": "a/b", "base_model_id": "--x"},
    ],
)
def test_a_malformed_import_is_refused(studio: StudioServer, body: dict[str, Any]) -> None:
    response = bring(studio, **body)
    assert (response.status_code, response.json()["type"]) == (422, "/problems/invalid-request"), response.text


def test_uploads_that_are_none_leave_nothing(studio: StudioServer) -> None:
    before = stored(studio)
    assert upload(studio, b"no zip").json()["type"] == "/problems/adapter-rejected"
    assert upload(studio, bytes(5 * 2**20)).status_code == 413
    assert upload(studio, zip_of(adapter_files()), format="x").status_code == 422
    bomb = zip_of(adapter_files() | {"tokenizer.json": bytes(100 * 2**20)})
    assert upload(studio, bomb).status_code == 413
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    cut = studio.http.post(
        "/api/adapters", content=b'--b\r\nContent-Disposition: form-data; name="file"', headers=headers
    )
    assert cut.status_code == 422
    assert stored(studio) == before


def test_an_adapter_is_pushed_and_comes_back_from_the_hub(studio: StudioServer, hub: HubDouble, inbox: Path) -> None:
    adapter = bring(studio, path=str(write_files(inbox / "it", adapter_files()))).json()
    url = f"/api/adapters/{adapter['id']}/push"
    refused = studio.http.post(url, json={"repo_id": "me/mine"})
    assert (refused.status_code, refused.json()["type"]) == (403, "/problems/access-denied")
    assert "X-HF-Token" in refused.json()["detail"]
    started = studio.http.post(url, json={"repo_id": "me/mine"}, headers=HEADER)
    assert started.status_code == 202 and started.headers["Location"] == f"/api/exports/{started.json()['id']}"
    done = finished(studio, started.json()["id"])
    assert (done["state"], done["kind"]) == ("succeeded", "push"), done
    assert done["settings"] == {"repo_id": "me/mine", "private": True, "token": "request"}
    assert done["result"]["url"] == f"{hub.url}/me/mine" and done["files"] == []
    back = studio.http.post("/api/adapters", json={"hub_id": "me/mine"}, headers=HEADER).json()
    assert back["source"]["commit"] == done["result"]["commit"]
    assert studio.adapter_weights(back["id"]) == studio.adapter_weights(adapter["id"])

    others = studio.http.post(url, json={"repo_id": "others/mine"}, headers=HEADER).json()
    failed = finished(studio, others["id"])
    assert (failed["state"], failed["error"]["class"]) == ("failed", "access_denied"), failed
    for entry in (adapter, back):
        studio.http.delete(f"/api/adapters/{entry['id']}")


def test_a_push_that_hangs_is_cancelled_and_one_whose_token_is_gone_is_not_made_with_another(
    hub: HubDouble, model_dirs: Path, tmp_path: Path
) -> None:
    hub.tokens.add("hf_server")
    environment = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_server",
    }
    with start_server(tmp_path / "data", model_dirs, **environment) as studio:
        adapter = bring(studio, path=str(write_files(studio.home / "it", adapter_files()))).json()
        hub.fail("preupload", "hang", times=2)

        def push(repo_id: str, headers: dict[str, str]) -> str:
            before = hub.requests["preupload"]
            url = f"/api/adapters/{adapter['id']}/push"
            export_id = str(studio.http.post(url, json={"repo_id": repo_id}, headers=headers).json()["id"])
            wait_until(lambda: hub.requests["preupload"] > before)
            return export_id

        hung = push("me/hung", HEADER)
        assert studio.http.post(f"/api/exports/{hung}/cancel").status_code == 202
        assert finished(studio, hung)["state"] == "cancelled"
        left = push("me/left", HEADER)
        studio.kill()
        hub.release()
        studio.start()
        failed = finished(studio, left)
        assert (failed["state"], failed["error"]["class"]) == ("failed", "access_denied"), failed
        assert "push again" in failed["error"]["message"] and hub.files("me/left") == {}
        assert finished(studio, push("me/served", {}))["state"] == "succeeded"
        assert hub.seen[-1].headers["Authorization"] == "Bearer hf_server"
