"""Preferences and answers by a schema on the embedded model, through the unmodified `openai` package."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.support.openai_clients import client_of, jsonl
from tests.support.server import StudioServer, start_server, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BETTER, WORSE = "Ahoy! I am Pip, and I love crackers.", "I am a language model."


class Animal(BaseModel):
    kind: Literal["bird", "fish", "cat"]
    legs: int
    sounds: list[Literal["squawk", "purr", "none"]]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path, embedded_path: Path) -> Iterator[StudioServer]:
    with start_server(tmp_path_factory.mktemp("home"), model_dirs) as server:
        yield server


@pytest.fixture(scope="module")
def client(studio: StudioServer) -> Iterator[OpenAI]:
    with client_of(studio, max_retries=8) as made:
        yield made


def test_a_dpo_fine_tune_survives_a_killed_server_and_prefers_the_better_answer(
    client: OpenAI, studio: StudioServer
) -> None:
    names = ("Ann", "Ben", "Cid", "Dora", "Eve", "Finn", "Gus", "Hal")
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"I am {name}. Who are you?"}]},
            "preferred_output": [{"role": "assistant", "content": BETTER}],
            "non_preferred_output": [{"role": "assistant", "content": WORSE}],
        }
        for name in names
    ]
    file = client.files.create(file=("pairs.jsonl", jsonl(*rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=EMBEDDED_ID,
        training_file=file.id,
        suffix="tone",
        seed=5,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 4, "batch_size": 4, "beta": 0.1}}},
        extra_body={"peft": {"checkpoint_every_steps": 2}},
    )
    own_id = "job_" + job.id.removeprefix("ftjob-")
    studio.wait_for_step(own_id, 3)
    studio.kill()
    studio.start()
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at is not None, 900)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded", done.error
    assert studio.job(own_id)["attempts"] == 2 and len(studio.http.get("/api/training/jobs").json()["jobs"]) == 1
    events = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100).data]
    figures: dict[int, Any] = {data["step"]: data for data in events if isinstance(data, dict) and "train_loss" in data}
    assert sorted(figures) == list(range(1, 9))
    assert figures[8]["train_loss"] < figures[1]["train_loss"] and figures[8]["train_margin"] > 0
    assert done.fine_tuned_model is not None
    last = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    asked: list[Any] = [{"role": "user", "content": "I am Ida. Who are you?"}]
    said = [
        client.chat.completions.create(model=name, messages=asked, temperature=0, max_tokens=16).choices[0].message
        for name in (done.fine_tuned_model, last)
    ]
    assert said[0].content == said[1].content  # the last checkpoint is what was handed out


def test_an_answer_by_a_schema_says_something_sensible(client: OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "Describe a parrot as JSON with kind, legs and sounds."}]
    for seed in (1, 2, 3):
        said = client.chat.completions.parse(
            model=EMBEDDED_ID, messages=asked, response_format=Animal, seed=seed, temperature=0.7, max_tokens=120
        ).choices[0]
        assert isinstance(said.message.parsed, Animal) and said.finish_reason == "stop"
    free = client.chat.completions.create(
        model=EMBEDDED_ID, messages=asked, response_format={"type": "json_object"}, temperature=0, max_tokens=200
    )
    assert (free.choices[0].message.content or "").startswith("{")
