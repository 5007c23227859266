"""The main job through the door users use: a real server, real engines, every algorithm."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from domain.peft.algorithms import Algorithm
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, wait_until
from tests.support.stock_peft import in_stock_peft
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALGORITHMS = [algorithm.value for algorithm in Algorithm]
IN_4_BITS = {"quantization": "nf4"}
OVERRIDES = {
    "rank": 4,
    "alpha": 8,
    "max_seq_length": 64,
    "learning_rate": 0.01,
    "epochs": 2.0,
    "target_modules": ["q_proj", "up_proj"],
}

# The answer of stock PEFT, greedy, through the tokenizer and template that came with the adapter.
ANSWER = """tokenizer.decode(model.generate(
    (ids := tokenizer(
        tokenizer.apply_chat_template(
            [{{"role": "user", "content": {question!r}}}], tokenize=False, add_generation_prompt=True
        ),
        add_special_tokens=False,
        return_tensors="pt",
    ).input_ids),
    max_new_tokens=12,
    do_sample=False,
    pad_token_id=tokenizer.pad_token_id,
)[0, ids.shape[1]:], skip_special_tokens=True)"""


@pytest.fixture(scope="module")
def dataset(studio: StudioServer) -> dict[str, Any]:
    return studio.upload(messages_jsonl(), name="twice")


@pytest.mark.parametrize(
    ("algorithm", "more"), [*((name, {}) for name in ALGORITHMS), ("pissa", IN_4_BITS)], ids=[*ALGORITHMS, "pissa nf4"]
)
def test_every_algorithm_loads_trains_and_hands_out_an_adapter_that_stock_peft_loads(
    studio: StudioServer, dataset: dict[str, Any], tiny_path: Path, tmp_path: Path, algorithm: str, more: dict[str, Any]
) -> None:
    # B's rate is then 0.016, as fast as the others learn.
    overrides = OVERRIDES | more | ({"learning_rate": 0.001} if algorithm == "lora-plus" else {})
    loaded = studio.load(TINY_ID, algorithm=algorithm, overrides=overrides)
    assert (loaded["state"], loaded["engine"], loaded["device"]) == ("ready", "transformers", "cpu")
    question = "say 3 twice"
    before = studio.generate(loaded["id"], question, max_new_tokens=12)["text"]
    job = studio.submit(
        loaded_model_id=loaded["id"],
        dataset_id=dataset["id"],
        validation_fraction=0.25,
        algorithm=algorithm,
        overrides=overrides,
    )
    events = studio.events(job["id"])
    assert [sequence for sequence, _ in events] == list(range(1, len(events) + 1))
    job = studio.job(job["id"])
    assert job["state"] == "succeeded", job["error"]
    assert job["metrics"]["final_eval_loss"] < job["metrics"]["initial_eval_loss"]
    assert job["progress"]["step"] == job["progress"]["total_steps"] == 10

    zipped = studio.http.get(f"/api/adapters/{job['adapter_id']}/download").content
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        archive.extractall(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    doubled = algorithm in ("pissa", "olora")
    assert config["r"] == (8 if doubled else 4)
    assert config["lora_alpha"] == (16 if doubled else 8)  # doubled with the rank by the conversion
    assert config["use_rslora"] == (algorithm == "rslora")
    assert config["use_dora"] == (algorithm == "dora")
    assert config["init_lora_weights"] is True
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    assert (config["bias"], config["base_model_name_or_path"]) == ("none", TINY_ID)
    assert config["lora_dropout"] == job["config"]["dropout"]

    # The served answer and stock PEFT's are the same text, token by token; the bare base still answers as before.
    served = studio.generate(loaded["id"], question, job["adapter_id"], max_new_tokens=12)["text"]
    stock = in_stock_peft(
        tiny_path, tmp_path, ANSWER.format(question=question), four_bit=job["config"]["quantization"] == "nf4"
    )
    assert stock == served
    assert served != before
    assert studio.generate(loaded["id"], question, max_new_tokens=12)["text"] == before
    assert studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}").status_code == 204


def test_the_embedded_model_learns_over_http_with_no_network(studio: StudioServer) -> None:
    loaded = studio.load(EMBEDDED_ID, use_case="chatbot")
    assert loaded["parameters"] == {"total": 134_515_008, "trainable": 4_884_480}
    assert "Paris" in studio.generate(loaded["id"], "What is the capital of France?")["text"]
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": "Squawk!"} for n in range(8)]
    dataset = studio.upload("".join(json.dumps(row) + "\n" for row in rows))
    job = studio.submit(
        loaded_model_id=loaded["id"],
        dataset_id=dataset["id"],
        overrides={"max_steps": 6, "learning_rate": 2e-3, "scheduler": "constant", "max_seq_length": 128},
    )
    studio.events(job["id"])
    job = studio.job(job["id"])
    assert job["state"] == "succeeded", job["error"]
    assert "Squawk" in studio.generate(loaded["id"], "What is 9 plus 9?", job["adapter_id"], max_new_tokens=8)["text"]
    assert "Squawk" not in studio.generate(loaded["id"], "What is 9 plus 9?", max_new_tokens=8)["text"]
    assert [engine.pid for engine in studio.engines()] == [loaded["engine_pid"]]  # one base, one engine
    assert studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}").status_code == 204
    assert studio.engines() == []


def test_fifty_requests_for_one_model_are_one_load(studio: StudioServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(50) as pool:
        loaded = list(pool.map(lambda _: studio.load(TINY_ID, overrides={"max_seq_length": 32}), range(50)))
    assert len({model["id"] for model in loaded}) == 1
    assert len(studio.engines()) == 1
    other = studio.load(TINY_ID, algorithm="rslora", overrides={"max_seq_length": 32})
    assert other["id"] != loaded[0]["id"] and other["engine_pid"] == loaded[0]["engine_pid"]
    for model_id in (loaded[0]["id"], other["id"]):
        assert len(studio.engines()) == 1
        assert studio.http.delete(f"/api/peft/loaded-models/{model_id}").status_code == 204
    assert studio.engines() == []


def test_load_answers_at_once_with_where_to_look(studio: StudioServer) -> None:
    response = studio.http.post("/api/peft/load-model", json={"model_id": TINY_ID, "overrides": {"max_seq_length": 33}})
    assert response.status_code == 202
    assert response.headers["location"] == f"/api/peft/loaded-models/{response.json()['id']}"
    assert response.json()["state"] in ("queued", "loading")
    assert studio.http.get(response.headers["location"]).status_code == 200
    ready = studio.load(TINY_ID, overrides={"max_seq_length": 33})
    assert ready["id"] == response.json()["id"]
    assert [model["id"] for model in studio.http.get("/api/peft/loaded-models").json()["models"]] == [ready["id"]]


def test_generation_streams_what_it_answers_whole(studio: StudioServer) -> None:
    loaded = studio.load(TINY_ID)
    body = {"prompt": "the quick", "temperature": 0, "max_new_tokens": 20, "stop": ["zzz"]}
    whole = studio.http.post(f"/api/peft/loaded-models/{loaded['id']}/generate", json=body).json()
    pieces, last = [], {}
    with studio.http.stream(
        "POST", f"/api/peft/loaded-models/{loaded['id']}/generate", json=body | {"stream": True}
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data" and kind == "token":
                pieces.append(json.loads(value)["text"])
            elif name == "data":
                last = json.loads(value)
    assert "".join(pieces) == last["text"] == whole["text"]
    assert last["completion_tokens"] == whole["completion_tokens"]
    sampled = [
        studio.generate(loaded["id"], "the quick", temperature=1.5, seed=seed, top_p=0.9)["text"] for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_every_setting_that_is_sent_is_the_setting_that_is_used(studio: StudioServer, dataset: dict[str, Any]) -> None:
    sent = {
        "rank": 3,
        "alpha": 5,
        "dropout": 0.15,
        "target_modules": ["v_proj"],
        "use_rslora": True,
        "learning_rate": 0.003,
        "batch_size": 3,
        "gradient_accumulation": 2,
        "max_steps": 3,
        "warmup_ratio": 0.4,
        "scheduler": "constant",
        "max_seq_length": 48,
        "packing": True,
        "gradient_checkpointing": True,
        "seed": 9,
    }
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], algorithm="lora", overrides=sent)
    assert {name: job["config"][name] for name in sent} == sent
    studio.events(job["id"])
    adapter = studio.http.get(f"/api/adapters/{studio.job(job['id'])['adapter_id']}").json()
    assert {name: adapter["config"][name] for name in sent} == sent
    config = json.loads((Path(adapter["path"]) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.15)
    assert (config["target_modules"], config["use_rslora"]) == (["v_proj"], True)
    rates = [
        row["learning_rate"] for row in studio.http.get(f"/api/training/jobs/{job['id']}/metrics").json()["metrics"]
    ]
    assert rates == pytest.approx([0.0, 0.0015, 0.003])


def test_the_same_idempotency_key_is_the_same_job(studio: StudioServer, dataset: dict[str, Any]) -> None:
    body = {"model_id": TINY_ID, "dataset_id": dataset["id"], "overrides": {"max_steps": 1, "max_seq_length": 64}}
    first = studio.submit(**body, idempotency_key="once")
    assert studio.submit(**body, idempotency_key="once")["id"] == first["id"]
    other = studio.http.post("/api/training/jobs", json=body | {"priority": 3, "idempotency_key": "once"})
    assert (other.status_code, other.json()["type"]) == (409, "/problems/idempotency-key-reused")
    studio.events(first["id"])


def test_a_job_is_cancelled_while_it_runs_and_the_base_stays(studio: StudioServer, dataset: dict[str, Any]) -> None:
    own_base = {"precision": "bf16"}  # shared with no other test, so that unloading it would end its engine
    loaded = studio.load(TINY_ID, overrides=own_base)
    job = studio.submit(
        loaded_model_id=loaded["id"], dataset_id=dataset["id"], overrides={"max_steps": 100_000, **own_base}
    )
    studio.wait_for_step(job["id"], 2)
    busy = studio.http.post(f"/api/peft/loaded-models/{loaded['id']}/generate", json={"prompt": "x"})
    assert (busy.status_code, busy.json()["type"]) == (409, "/problems/model-busy")
    assert studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}").status_code == 409
    assert studio.http.post(f"/api/training/jobs/{job['id']}/cancel").status_code == 202
    studio.events(job["id"])
    assert studio.job(job["id"])["state"] == "cancelled"
    assert studio.job(job["id"])["adapter_id"] is None
    again = studio.http.post(f"/api/training/jobs/{job['id']}/cancel")
    assert (again.status_code, again.json()["type"]) == (409, "/problems/transition-not-permitted")
    assert studio.generate(loaded["id"], "still there?")["completion_tokens"] > 0


def test_events_are_replayed_from_where_a_reader_left(studio: StudioServer, dataset: dict[str, Any]) -> None:
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides={"max_steps": 5, "max_seq_length": 64})
    everything = studio.events(job["id"])
    assert studio.events(job["id"], last_event_id=4) == everything[4:]
    as_json = studio.http.get(f"/api/training/jobs/{job['id']}/events", params={"format": "json", "after": 2}).json()
    assert [(event["sequence"], event["kind"]) for event in as_json["events"]] == everything[2:]


def test_the_stream_says_what_the_json_says_and_that_nobody_may_hold_it_back(
    studio: StudioServer, dataset: dict[str, Any]
) -> None:
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides={"max_steps": 2, "max_seq_length": 64})
    url = f"/api/training/jobs/{job['id']}/events"
    streamed = studio.http.get(url)
    said = {name: streamed.headers[name] for name in ("content-type", "cache-control", "x-accel-buffering")}
    assert said == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    data = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if line.startswith("data: ")]
    listed = studio.http.get(url, params={"format": "json"}, headers={"Last-Event-ID": "0"}).json()["events"]
    assert data == [event["data"] | {"created_at": event["created_at"]} for event in listed]
    assert studio.http.get(f"{url}?format=sse&after={len(listed) - 1}").text.count("data: ") == 1
    for query, status in (("format=xml", 422), ("after=-1", 422), ("format=json&after=-1", 422)):
        refused = studio.http.get(f"{url}?{query}")
        assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json")
    assert studio.http.post(f"{url}?format=json", json={}).status_code == 405


def test_nothing_to_learn_is_a_failed_job_that_says_so(studio: StudioServer) -> None:
    dataset = studio.upload(json.dumps({"prompt": "x " * 400, "completion": "y"}))
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides={"max_seq_length": 64})
    studio.events(job["id"])
    error = studio.job(job["id"])["error"]
    assert error["class"] == "dataset_not_trainable" and "max_seq_length" in error["message"]


def test_an_adapter_asked_for_with_the_load_is_on_the_base_once_it_is_loaded(
    studio: StudioServer, dataset: dict[str, Any]
) -> None:
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset["id"], overrides={"max_steps": 1, "max_seq_length": 64})
    studio.events(job["id"])
    adapter_id = studio.job(job["id"])["adapter_id"]
    body = {"model_id": TINY_ID, "adapter_id": adapter_id, "overrides": {"quantization": "nf4"}}
    response = studio.http.post("/api/peft/load-model", json=body)
    assert response.status_code == 202
    path = f"/api/peft/loaded-models/{response.json()['id']}"
    wait_until(lambda: studio.http.get(path).json()["adapters"] == [adapter_id])
    assert studio.http.delete(path).status_code == 204
    unknown = studio.http.post("/api/peft/load-model", json=body | {"adapter_id": "adp_none"})
    assert unknown.status_code == 404


def test_a_deleted_adapter_leaves_the_base_and_the_disk(studio: StudioServer, dataset: dict[str, Any]) -> None:
    loaded = studio.load(TINY_ID)
    job = studio.submit(loaded_model_id=loaded["id"], dataset_id=dataset["id"], overrides={"max_steps": 1})
    studio.events(job["id"])
    adapter = studio.http.get(f"/api/adapters/{studio.job(job['id'])['adapter_id']}").json()
    assert adapter["id"] in studio.http.get(f"/api/peft/loaded-models/{loaded['id']}").json()["adapters"]
    assert studio.http.delete(f"/api/adapters/{adapter['id']}").status_code == 204
    assert adapter["id"] not in studio.http.get(f"/api/peft/loaded-models/{loaded['id']}").json()["adapters"]
    assert not Path(adapter["path"]).exists()
    gone = studio.http.post(
        f"/api/peft/loaded-models/{loaded['id']}/generate", json={"prompt": "x", "adapter_id": adapter["id"]}
    )
    assert (gone.status_code, gone.json()["type"]) == (404, "/problems/adapter-not-found")


def test_a_dataset_that_a_job_refers_to_is_not_deleted(studio: StudioServer, dataset: dict[str, Any]) -> None:
    response: httpx.Response = studio.http.delete(f"/api/datasets/{dataset['id']}")
    assert (response.status_code, response.json()["type"]) == (409, "/problems/dataset-in-use")


def test_a_job_on_a_loaded_base_takes_it_as_it_is_or_is_refused(studio: StudioServer, dataset: dict[str, Any]) -> None:
    loaded = studio.load(TINY_ID, overrides={"precision": "bf16", "max_seq_length": 65})
    body = {"loaded_model_id": loaded["id"], "dataset_id": dataset["id"]}
    job = studio.submit(**body, overrides={"max_steps": 1})
    assert job["config"]["precision"] == "bf16"
    for request in ({"overrides": {"precision": "fp32"}}, {"algorithm": "qlora"}):
        refused = studio.http.post("/api/training/jobs", json=body | request)
        assert (refused.status_code, refused.json()["type"]) == (422, "/problems/setting-rejected")
    studio.events(job["id"])
    assert len(studio.engines()) >= 1 and studio.job(job["id"])["state"] == "succeeded"


def test_a_job_and_its_model_say_which_engine_and_why(studio: StudioServer, dataset: dict[str, Any]) -> None:
    loaded = studio.load(TINY_ID)
    assert loaded["engine"] == "transformers" and "Unsloth" in loaded["engine_reason"]
    job = studio.submit(loaded_model_id=loaded["id"], dataset_id=dataset["id"], overrides={"max_steps": 1})
    studio.events(job["id"])
    engine = studio.job(job["id"])["engine"]
    assert engine["name"] == "transformers" and engine["reason"] == loaded["engine_reason"]
    assert "PEFT" in engine["computation"]
    refused = studio.http.post("/api/peft/load-model", json={"model_id": TINY_ID, "engine": "unsloth"})
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/setting-rejected")
    assert loaded["engine_reason"] in refused.json()["detail"]
