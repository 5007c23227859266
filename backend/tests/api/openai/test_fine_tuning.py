"""Fine-tunes through the unmodified `openai` package, on the jobs that /api shows."""

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.openai_clients import async_client_of, client_of, jsonl
from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine
QUICK: dict[str, Any] = {"rank": 4, "max_seq_length": 64, "learning_rate": 0.01, "target_modules": ["q_proj"]}
LONG: dict[str, Any] = {"peft": QUICK | {"max_steps": 100_000, "checkpoint_every_steps": 1}}
KEYS = {
    "id", "object", "created_at", "error", "fine_tuned_model", "finished_at", "hyperparameters", "model",
    "organization_id", "result_files", "seed", "status", "trained_tokens", "training_file", "validation_file",
    "estimated_finish", "integrations", "metadata", "method",
}  # fmt: skip


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    names = f"gpt-4o-mini*={TINY_ID}, gpt-3.5-turbo = {TINY_ID}"
    with start_server(tmp_path_factory.mktemp("home"), model_dirs, PEFT_STUDIO_MODEL_NAMES=names) as server:
        yield server


@pytest.fixture(scope="module")
def file_id(client: OpenAI) -> str:
    file = client.files.create(file=("train.jsonl", messages_jsonl().encode()), purpose="fine-tune")
    return client.files.wait_for_processing(file.id, poll_interval=0.05).id


@pytest.fixture(scope="module")
def done(client: OpenAI, file_id: str) -> Any:
    """A job to its end, with every kind of setting."""
    job = client.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18",
        training_file=file_id,
        validation_file=file_id,
        suffix="twice it",
        seed=7,
        metadata={"team": "a", "run": "first"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 1.5}},
        },
        extra_body={"peft": {key: QUICK[key] for key in ("rank", "max_seq_length", "target_modules")}},
    )
    assert set(job.to_dict()) == KEYS
    assert job.status in ("queued", "running") and job.fine_tuned_model is None
    return ended(client, job.id)


def ended(client: OpenAI, job_id: str) -> Any:
    def over() -> bool:
        return client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled")

    wait_until(over)
    return client.fine_tuning.jobs.retrieve(job_id)


def inner(job_id: str) -> str:
    return "job_" + job_id.removeprefix("ftjob-")


def test_a_job_to_its_end(client: OpenAI, studio: StudioServer, done: Any, file_id: str) -> None:
    assert done.status == "succeeded", done.error
    assert set(done.to_dict()) == KEYS
    assert done.fine_tuned_model == f"ft:gpt-4o-mini-2024-07-18:local:twice-it:{done.id.removeprefix('ftjob-')}"
    assert done.model == "gpt-4o-mini-2024-07-18" and done.seed == 7 and done.metadata == {"team": "a", "run": "first"}
    expected = {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 1.5}
    assert done.hyperparameters.to_dict() == expected
    assert done.method.to_dict() == {"type": "supervised", "supervised": {"hyperparameters": expected}}
    assert (done.training_file, done.validation_file) == (file_id, file_id)
    assert done.trained_tokens > 0 and done.finished_at >= done.created_at and done.error is None
    job = studio.job(inner(done.id))
    assert job["model_id"] == TINY_ID and job["config"]["rank"] == 4 and job["config"]["seed"] == 7
    assert job["config"]["batch_size"] * job["config"]["gradient_accumulation"] == 6
    assert job["progress"]["total_steps"] == 8 and job["state"] == "succeeded"


def test_the_multiplier_is_of_the_rate_that_the_service_would_choose(studio: StudioServer, done: Any) -> None:
    config = studio.job(inner(done.id))["config"]
    body = {"model_id": TINY_ID, "algorithm": "lora", "overrides": {"rank": 4}}
    chosen = studio.http.post("/api/peft/configure", json=body).json()["config"]["learning_rate"]
    assert config["learning_rate"] == pytest.approx(1.5 * chosen)


def test_events_are_newest_first_and_paged(client: OpenAI, studio: StudioServer, done: Any) -> None:
    first = client.fine_tuning.jobs.list_events(done.id, limit=3)
    assert len(first.data) == 3 and first.has_more
    every = list(first)
    assert every[0].message == "The job has successfully completed"
    assert every[-1].message == f"Created fine-tuning job: {done.id}"
    assert [event.id for event in every] == [
        event.id for event in client.fine_tuning.jobs.list_events(done.id, limit=99)
    ]
    assert {event.object for event in every} == {"fine_tuning.job.event"} and len({e.id for e in every}) == len(every)
    told: list[Any] = [event.data for event in every if event.type == "metrics"]
    losses = {data["step"]: data["train_loss"] for data in told if "train_loss" in data}
    assert losses == studio.metrics(inner(done.id))
    assert {event.level for event in every} == {"info"}


def test_checkpoints_are_those_of_the_epochs(client: OpenAI, done: Any) -> None:
    found = list(client.fine_tuning.jobs.checkpoints.list(done.id, limit=1))
    assert [checkpoint.step_number for checkpoint in found] == [8, 4]
    assert found[1].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-4"
    assert found[1].fine_tuning_job_id == done.id and found[1].object == "fine_tuning.job.checkpoint"
    metrics = found[1].metrics
    assert metrics.step == 4 and metrics.train_loss and metrics.valid_loss and metrics.full_valid_loss
    page = client.fine_tuning.jobs.checkpoints.list(done.id).to_dict()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (found[0].id, found[1].id, False)


def test_the_result_file_has_every_step(client: OpenAI, studio: StudioServer, done: Any) -> None:
    (result,) = done.result_files
    file = client.files.retrieve(result)
    content = client.files.content(result).text
    assert (file.purpose, file.status, file.bytes) == ("fine-tune-results", "processed", len(content))
    rows = list(csv.DictReader(io.StringIO(content)))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert {int(row["step"]): float(row["train_loss"]) for row in rows} == studio.metrics(inner(done.id))
    assert [row["step"] for row in rows if row["valid_loss"]] == ["4", "8"]
    assert all(0 <= float(row["train_accuracy"]) <= 1 for row in rows)
    assert [row["step"] for row in rows if row["valid_mean_token_accuracy"]] == ["4", "8"]
    assert result in [each.id for each in client.files.list(purpose="fine-tune-results")]
    with pytest.raises(openai.BadRequestError):
        client.files.delete(result)


def answer_of(client: OpenAI, model: str, **more: Any) -> Any:
    asked: list[Any] = [{"role": "user", "content": "say 3 twice"}]
    return client.chat.completions.create(
        model=model, messages=asked, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3, **more
    )


def first_chances(client: OpenAI, model: str) -> list[float]:
    return [other.logprob for other in answer_of(client, model).choices[0].logprobs.content[0].top_logprobs]


def test_the_result_and_a_checkpoint_can_be_chatted_with(client: OpenAI, studio: StudioServer, done: Any) -> None:
    checkpoints = client.fine_tuning.jobs.checkpoints.list(done.id).data
    last, first = (checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints)
    names = [done.fine_tuned_model, last, first, "gpt-4o-mini"]
    result, at_the_end, half_way, base = (first_chances(client, name) for name in names)
    assert result == at_the_end  # the last checkpoint is what was handed out
    assert len({tuple(chances) for chances in (result, half_way, base)}) == 3
    for name in names[:3]:
        assert client.models.retrieve(name).id == name and answer_of(client, name).model == name
    made = studio.http.get("/api/adapters").json()["adapters"]
    steps = {adapter["source"].get("step") for adapter in made if adapter["job_id"] == inner(done.id)}
    assert steps == {None, 4, 8}
    kinds = {adapter["source"]["kind"] for adapter in made if adapter["job_id"] == inner(done.id)}
    assert kinds == {"training", "checkpoint"}
    with pytest.raises(openai.NotFoundError):
        answer_of(client, f"{done.fine_tuned_model}:ckpt-step-3")


def test_a_fine_tuned_model_is_listed_and_deleted(client: OpenAI, studio: StudioServer, file_id: str) -> None:
    asked: dict[str, Any] = {"model": TINY_ID, "training_file": file_id, "suffix": "gone"}
    job = client.fine_tuning.jobs.create(**asked, extra_body={"peft": QUICK | {"max_steps": 2}})
    name = ended(client, job.id).fine_tuned_model
    assert name is not None and name in [model.id for model in client.models.list()]
    assert answer_of(client, name).choices[0].message.role == "assistant"
    assert client.models.delete(name).to_dict() == {"id": name, "object": "model", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        answer_of(client, name)
    assert studio.http.get(f"/api/adapters/adp_{name.rpartition(':')[2]}").status_code == 404


def test_a_training_file_can_be_deleted_afterwards(client: OpenAI, studio: StudioServer) -> None:
    file = client.files.create(file=("t.jsonl", messages_jsonl(4).encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=TINY_ID, training_file=file.id, extra_body=LONG)
    with pytest.raises(openai.BadRequestError) as used:
        client.files.delete(file.id)
    assert used.value.code == "file_in_use"
    client.fine_tuning.jobs.cancel(job.id)
    assert ended(client, job.id).status == "cancelled"
    client.files.delete(file.id)
    assert file.id not in [each.id for each in client.files.list()]
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model=TINY_ID, training_file=file.id)
    assert studio.http.get(f"/api/datasets/ds_{file.id.removeprefix('file-')}").status_code == 200


def test_pause_resume_and_cancel(client: OpenAI, studio: StudioServer, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(model=TINY_ID, training_file=file_id, suffix="steered", extra_body=LONG)
    with pytest.raises(openai.BadRequestError) as early:
        client.fine_tuning.jobs.resume(job.id)
    assert early.value.code == "transition_not_permitted"
    assert early.value.response.headers["x-should-retry"] == "false"
    studio.wait_for_step(inner(job.id), 2)
    running = client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running" and running.estimated_finish and running.trained_tokens is None
    client.fine_tuning.jobs.pause(job.id)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).to_dict()["status"] == "paused")
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    client.fine_tuning.jobs.cancel(job.id)
    assert ended(client, job.id).status == "cancelled"
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError):
            call(job.id)


def test_lists_and_their_filter(client: OpenAI, studio: StudioServer, done: Any) -> None:
    every = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert done.id in every
    assert [inner(job_id) for job_id in every] == [
        j["id"] for j in studio.http.get("/api/training/jobs").json()["jobs"]
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [done.id]
    assert list(client.fine_tuning.jobs.list(metadata={"team": "a", "run": "second"})) == []
    without = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert done.id not in [job.id for job in without]


def test_the_same_request_again_is_the_same_job(client: OpenAI, studio: StudioServer, file_id: str) -> None:
    asked: dict[str, Any] = {"model": TINY_ID, "training_file": file_id, "suffix": "once", "extra_body": LONG}
    first = client.fine_tuning.jobs.create(**asked)
    assert client.fine_tuning.jobs.create(**asked).id == first.id
    other = client.fine_tuning.jobs.create(**asked | {"suffix": "twice"})
    assert other.id != first.id
    client.fine_tuning.jobs.cancel(first.id)
    retried = client.fine_tuning.jobs.create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    assert retried.id == first.id
    ended(client, first.id)
    anew = client.fine_tuning.jobs.create(**asked)
    assert anew.id not in (first.id, other.id)
    for job in (other, anew):
        client.fine_tuning.jobs.cancel(job.id)
        ended(client, job.id)


def test_a_job_of_the_other_door_is_shown(client: OpenAI, studio: StudioServer, file_id: str) -> None:
    dataset = "ds_" + file_id.removeprefix("file-")
    job = studio.submit(model_id=TINY_ID, dataset_id=dataset, overrides=QUICK | {"max_steps": 1})
    found = ended(client, "ftjob-" + job["id"].removeprefix("job_"))
    assert found.status == "succeeded" and found.training_file == file_id and set(found.to_dict()) == KEYS
    assert found.fine_tuned_model == f"ft:{TINY_ID}:local::{job['id'].removeprefix('job_')}"


def pair(number: int) -> dict[str, Any]:
    better, worse = ({"role": "assistant", "content": f"{number} {word}"} for word in ("twice", "never"))
    asked = {"messages": [{"role": "user", "content": f"say {number}"}], "tools": [], "parallel_tool_calls": True}
    return {"input": asked, "preferred_output": [better], "non_preferred_output": [worse]}


def adapters_of(studio: StudioServer) -> dict[str, Any]:
    return {adapter["id"]: adapter for adapter in studio.http.get("/api/adapters").json()["adapters"]}


def test_a_fine_tuned_model_and_a_checkpoint_are_fine_tuned_on(
    client: OpenAI, studio: StudioServer, done: Any, file_id: str
) -> None:
    """First answers, then preferences, with the first adapter as the reference; and answers after a checkpoint."""
    pairs = client.files.create(file=("after.jsonl", jsonl(*map(pair, range(8)))), purpose="fine-tune")
    by_dpo: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 4, "batch_size": 8}}}
    first = done.fine_tuned_model
    preferring = client.fine_tuning.jobs.create(
        model=first, training_file=pairs.id, method=by_dpo, suffix="then", extra_body={"peft": {"learning_rate": 0.01}}
    )
    short: dict[str, Any] = {"peft": {"max_steps": 1, "max_seq_length": 64}}
    checkpoint = f"{first}:ckpt-step-4"
    on = client.fine_tuning.jobs.create(model=checkpoint, training_file=file_id, extra_body=short)
    begins_with = {}
    for job, model in ((preferring, first), (on, checkpoint)):
        result = ended(client, job.id)
        assert result.status == "succeeded" and result.model == model, result.error
        own, suffix = job.id.removeprefix("ftjob-"), "then" if job is preferring else ""
        assert result.fine_tuned_model == f"ft:gpt-4o-mini-2024-07-18:local:{suffix}:{own}"
        assert answer_of(client, result.fine_tuned_model).choices
        shown = studio.job(inner(job.id))
        begins_with[shown["adapter_id"]] = shown["initial_adapter_id"]
        assert (shown["config"]["rank"], shown["config"]["init_weights"]) == (4, "adapter")
    begun = f"adp_{done.id.removeprefix('ftjob-')}"
    assert list(begins_with.values()) == [begun, f"{begun}s4"]
    listed = adapters_of(studio)
    assert {name: listed[name]["source"]["initial_adapter_id"] for name in begins_with} == begins_with
    losses = studio.metrics(inner(preferring.id))
    assert losses[1] == pytest.approx(0.6931, abs=1e-3) and losses[4] < losses[1]
    assert studio.metrics(inner(on.id))[1] < studio.metrics(inner(done.id))[1]
    for more, param in (({"rank": 8}, "rank"), ({"algorithm": "dora"}, "algorithm"), ({"revision": "x"}, "revision")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(model=first, training_file=file_id, extra_body={"peft": more})
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError, match="no-such"):
        client.fine_tuning.jobs.create(model=f"{first}:no-such", training_file=file_id)


def test_an_adapter_is_continued_under_api_and_stays_as_long_as_a_job_needs_it(
    client: OpenAI, studio: StudioServer, file_id: str
) -> None:
    asked: dict[str, Any] = {"model": TINY_ID, "training_file": file_id, "suffix": "short"}
    job = client.fine_tuning.jobs.create(**asked, extra_body={"peft": QUICK | {"max_steps": 1, "algorithm": "rslora"}})
    assert ended(client, job.id).status == "succeeded"
    adapter = f"adp_{job.id.removeprefix('ftjob-')}"
    configured = studio.http.post("/api/peft/configure", json={"initial_adapter_id": adapter}).json()
    assert (configured["algorithm"], configured["model_id"]) == ("rslora", TINY_ID)
    rank = configured["parameters"]["rank"]
    assert rank == {"value": 4, "source": "adapter", "reason": f"{adapter}, which the run continues, has it"}
    assert configured["parameters"]["target_modules"]["value"] == ["q_proj"]
    body = {"dataset_id": "ds_" + file_id.removeprefix("file-"), "initial_adapter_id": adapter}
    refused = studio.http.post("/api/training/jobs", json=body | {"overrides": {"alpha": 5}})
    assert refused.status_code == 422 and refused.json()["errors"][0]["location"] == ["alpha"]
    missing = studio.http.post("/api/training/jobs", json=body | {"initial_adapter_id": "adp_none"})
    assert missing.status_code == 404
    long = {"max_seq_length": 64, "max_steps": 100_000}
    running = studio.submit(**body, overrides=long)
    assert (running["algorithm"], running["config"]["use_rslora"]) == ("rslora", True)
    kept = studio.http.delete(f"/api/adapters/{adapter}")
    assert kept.status_code == 409 and running["id"] in kept.json()["detail"]
    studio.wait_for_step(running["id"], 1)
    studio.http.post(f"/api/training/jobs/{running['id']}/pause")
    studio.wait_for_state(running["id"], "paused")
    assert studio.http.delete(f"/api/adapters/{adapter}").status_code == 409
    studio.http.post(f"/api/training/jobs/{running['id']}/cancel")
    studio.wait_for_state(running["id"], "cancelled")
    assert studio.http.delete(f"/api/adapters/{adapter}").status_code == 204


def test_preferences_are_learned_by_dpo(client: OpenAI, studio: StudioServer) -> None:
    file = client.files.create(file=("pairs.jsonl", jsonl(*map(pair, range(12)))), purpose="fine-tune")
    asked: dict[str, Any] = {"model": TINY_ID, "training_file": file.id, "validation_file": file.id}
    with pytest.raises(openai.BadRequestError, match="dpo"):
        client.fine_tuning.jobs.create(**asked)
    by_dpo: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "beta": 0.3}}}
    job = client.fine_tuning.jobs.create(**asked, method=by_dpo, extra_body={"peft": QUICK})
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.method.type == "dpo" and done.method.to_dict()["dpo"]["hyperparameters"]["beta"] == 0.3
    assert studio.job(inner(job.id))["config"]["objective"] == "dpo"
    rows = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert len(rows) == 9 and float(rows[0]["train_loss"]) == pytest.approx(0.6931, abs=1e-3)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert all(0 <= float(line["train_accuracy"]) <= 1 for line in rows) and rows[-1]["valid_mean_token_accuracy"]
    event: Any = client.fine_tuning.jobs.list_events(job.id, limit=50).data
    assert any(each.data.get("train_margin", 0) > 0 for each in event)
    assert answer_of(client, done.fine_tuned_model).choices
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1]
    assert answer_of(client, checkpoint.fine_tuned_model_checkpoint).choices


def test_a_job_goes_on_when_the_server_is_killed_under_the_client(tmp_path: Path, model_dirs: Path) -> None:
    with start_server(tmp_path, model_dirs) as studio, client_of(studio, max_retries=8) as client:
        file = client.files.create(file=("train.jsonl", messages_jsonl().encode()), purpose="fine-tune")
        own = QUICK | {"max_steps": 120, "checkpoint_every_steps": 1}
        job = client.fine_tuning.jobs.create(model=TINY_ID, training_file=file.id, extra_body={"peft": own})
        studio.wait_for_step(inner(job.id), 5)
        studio.kill()
        studio.start()
        assert client.files.content(file.id).text == messages_jsonl()
        done = ended(client, job.id)
        assert done.status == "succeeded" and studio.job(inner(job.id))["attempts"] == 2
        metrics: list[Any] = [e.data for e in client.fine_tuning.jobs.list_events(job.id) if e.type == "metrics"]
        assert [data["step"] for data in metrics if "train_loss" in data] == list(range(120, 0, -1))
        assert answer_of(client, done.fine_tuned_model).choices


def test_the_async_client_follows_a_job(studio: StudioServer, done: Any, file_id: str) -> None:
    async def scenario() -> None:
        async with async_client_of(studio) as client:
            jobs = [job.id async for job in client.fine_tuning.jobs.list(limit=1)]
            assert done.id in jobs
            events = [event.id async for event in client.fine_tuning.jobs.list_events(done.id, limit=2)]
            assert len(events) == len(set(events)) > 10
            steps = [c.step_number async for c in client.fine_tuning.jobs.checkpoints.list(done.id, limit=1)]
            assert steps == [8, 4]
            with pytest.raises(openai.BadRequestError):
                await client.fine_tuning.jobs.cancel(done.id)
            with pytest.raises(openai.NotFoundError):
                await client.fine_tuning.jobs.retrieve("ftjob-none")
            made = await client.fine_tuning.jobs.create(model=TINY_ID, training_file=file_id, extra_body=LONG)
            await client.fine_tuning.jobs.cancel(made.id)

    asyncio.run(scenario())


def test_a_job_that_fails_says_why(client: OpenAI) -> None:
    long = {"messages": [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "y"}]}
    file = client.files.create(file=("long.jsonl", jsonl(long, long)), purpose="fine-tune")
    job = ended(
        client, client.fine_tuning.jobs.create(model=TINY_ID, training_file=file.id, extra_body={"peft": QUICK}).id
    )
    assert job.status == "failed" and job.error.code and job.error.message and job.result_files == []
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


REFUSED: list[tuple[str, dict[str, Any], str | None]] = [
    ("answers by dpo", {"method": {"type": "dpo"}}, None),
    ("another's settings", {"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
    ("a beta without dpo", {"extra_body": {"peft": {"preference_beta": 0.1}}}, "preference_beta"),
    ("reinforcement", {"method": {"type": "reinforcement"}}, "method.type"),
    ("an integration", {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    ("no epochs", {"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ("a long suffix", {"suffix": "x" * 65}, "suffix"),
    ("too many pairs", {"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
    ("an unknown field", {"extra_body": {"rank": 4}}, "rank"),
    ("an unknown option", {"extra_body": {"peft": {"rnak": 4}}}, "peft.rnak"),
    ("an algorithm", {"extra_body": {"peft": {"algorithm": "lorra"}}}, "peft.algorithm"),
    (
        "both places",
        {"hyperparameters": {"n_epochs": 1}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
        "hyperparameters",
    ),
    ("twice", {"hyperparameters": {"n_epochs": 1}, "extra_body": {"peft": {"epochs": 2.0}}}, "n_epochs"),
    ("a negative seed", {"seed": -1}, "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("why", "more", "param"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_take_effect_is_refused(
    client: OpenAI, file_id: str, why: str, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=TINY_ID, training_file=file_id, **more)
    assert refused.value.param == param, refused.value


def test_bad_files_and_unknown_names_are_refused_with_what_to_do(client: OpenAI) -> None:
    bad = client.files.create(
        file=("bad.jsonl", messages_jsonl(2).encode() + b'{"messages": []}\n'), purpose="fine-tune"
    )
    with pytest.raises(openai.BadRequestError, match="line 3") as lines:
        client.fine_tuning.jobs.create(model=TINY_ID, training_file=bad.id)
    assert (lines.value.code, lines.value.param) == ("invalid_training_file", "training_file")
    other = client.files.create(file=("x.txt", b"x"), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="user_data"):
        client.fine_tuning.jobs.create(model=TINY_ID, training_file=other.id)
    good = client.files.create(
        file=("g.jsonl", json.dumps({"prompt": "a", "completion": "b"}).encode()), purpose="fine-tune"
    )
    with pytest.raises(openai.NotFoundError, match="PEFT_STUDIO_MODEL_NAMES=davinci-002="):
        client.fine_tuning.jobs.create(model="davinci-002", training_file=good.id)
    with pytest.raises(openai.NotFoundError, match="GET /v1/models lists them"):
        client.fine_tuning.jobs.create(model="ft:a:local::1", training_file=good.id)
