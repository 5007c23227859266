"""The flows of OpenAI's cookbook for fine-tuning, call by call, with the unmodified `openai` package.

Each step has a row in docs/from-openai.md. The calls and their arguments are the notebooks'; the rows are ours. Source:
openai-cookbook, `Chat_finetuning_data_prep`, `How_to_finetune_chat_models`, `Fine_tuning_for_function_calling`,
`Fine_tuning_direct_preference_optimization_guide`, `Leveraging_model_distillation_to_fine-tune_a_model`.
"""

import base64
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.openai_clients import jsonl
from tests.support.server import BACKEND, CACHE, StudioServer, start_server, wait_until
from tests.support.shapes import give_positions
from tests.support.tiny_model import copy_tiny_model

pytestmark = pytest.mark.engine
DOCS = BACKEND.parent / "docs" / "from-openai.md"
MODEL_ID = "tests/tools"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SYSTEM = "name the ingredients"
FLIGHT: dict[str, Any] = {
    "type": "object",
    "properties": {"direction": {"type": "string", "enum": ["left", "right"], "description": "where to"}},
    "required": ["direction"],
}
FUNCTIONS: list[Any] = [
    {"type": "function", "function": {"name": "fly", "description": "fly there", "parameters": FLIGHT}},
    {"type": "function", "function": {"name": "reject", "parameters": {"type": "object", "properties": {}}}},
]
DONE: set[str] = set()


def step(name: str) -> None:
    """Note that a step of the table has worked."""
    DONE.add(name)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    models = tmp_path_factory.mktemp("models")
    copy_tiny_model(models / MODEL_ID)
    (models / MODEL_ID / "chat_template.jinja").write_text(TEMPLATE)
    give_positions(models / MODEL_ID, 2048, CACHE)
    names = f"gpt-3.5-turbo*={MODEL_ID},gpt-4*={MODEL_ID}"
    with start_server(tmp_path_factory.mktemp("home"), models, PEFT_STUDIO_MODEL_NAMES=names) as server:
        yield server


def recipe(number: int) -> dict[str, Any]:
    asked = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Title: pie {number}\n\nIngredients: "},
    ]
    return {"messages": [*asked, {"role": "assistant", "content": json.dumps(["dough", f"fruit {number}"])}]}


def ended(client: OpenAI, job_id: str) -> Any:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).finished_at is not None)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
    return job


def result_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_data_preparation_and_a_chat_fine_tune(client: OpenAI, studio: StudioServer, tmp_path: Path) -> None:
    paths = [tmp_path / "training.jsonl", tmp_path / "validation.jsonl"]
    for path, rows in zip(paths, ([recipe(n) for n in range(26)], [recipe(n) for n in range(26, 28)]), strict=True):
        path.write_bytes(jsonl(*rows))
    dataset = [json.loads(line) for line in paths[0].read_text().splitlines()]
    known = {"role", "content", "name", "function_call", "weight"}
    assert all(message.keys() <= known and message["content"] for row in dataset for message in row["messages"])
    epochs = min(25, 100 // len(dataset)) if len(dataset) * 3 < 100 else 3  # the notebook's estimate
    step("rows are read and checked")

    with paths[0].open("rb") as training, paths[1].open("rb") as validation:
        training_file = client.files.create(file=training, purpose="fine-tune").id
        validation_file = client.files.create(file=validation, purpose="fine-tune").id
    step("files.create from a path")
    url = f"/api/datasets/ds_{training_file.removeprefix('file-')}/analyze"
    counted = studio.http.post(url, json={"model_id": MODEL_ID, "wait_s": 100}, timeout=120).json()
    assert counted["rows"] == 26 and counted["tokens"]["total"] > counted["trained_tokens"]["total"] > 0, counted
    step("tokens are counted")

    job = client.fine_tuning.jobs.create(
        training_file=training_file,
        validation_file=validation_file,
        model="gpt-3.5-turbo",
        suffix="recipe-ner",
        extra_body={"hyperparameters": {"batch_size": 8}},  # the notebook has none; a test is to be short
    )
    assert job.status in ("validating_files", "queued", "running")
    step("jobs.create with a validation file and a suffix")
    assert job.hyperparameters.n_epochs in ("auto", epochs)
    response = client.fine_tuning.jobs.retrieve(job.id)
    assert response.id == job.id
    step("jobs.retrieve: status and trained_tokens")
    job = ended(client, job.id)
    assert job.hyperparameters.n_epochs == epochs and job.trained_tokens
    step("the default number of epochs is the notebook's")

    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    events.reverse()
    messages = [event.message for event in events]
    assert messages[-1] == "The job has successfully completed"
    assert any(re.match(r"Step \d+/\d+: training loss=\d+\.\d\d", message) for message in messages)
    step("list_events in order")
    model = job.fine_tuned_model
    assert model is not None and model.startswith("ft:gpt-3.5-turbo:local:recipe-ner:")
    step("fine_tuned_model is the name")
    asked: list[Any] = recipe(30)["messages"][:2]
    answer = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=50)
    assert answer.choices[0].message.content is not None
    step("chat with the fine-tuned model")

    result = client.files.retrieve(job.result_files[0]).id
    step("files.retrieve of the result file")
    text = client.files.content(file_id=result).read().decode()
    rows = result_rows(text)
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    step("files.content: the CSV of every step")
    evaluated = [row for row in rows if row["valid_loss"]]
    best = min(evaluated, key=lambda row: float(row["valid_loss"]))
    assert len(evaluated) == epochs and 0 <= float(best["valid_mean_token_accuracy"]) <= 1
    step("the best epoch by the validation's loss and accuracy")
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert {str(checkpoint.step_number) for checkpoint in checkpoints} <= {row["step"] for row in evaluated}
    name = checkpoints[-1].fine_tuned_model_checkpoint
    assert client.chat.completions.create(model=name, messages=asked, max_tokens=2).choices
    step("checkpoints.list, and chat with a checkpoint of an earlier epoch")


def eval_calls(client: OpenAI, model: str, functions: list[Any]) -> list[str]:
    """The notebook's evaluation: which function each prompt calls."""
    called = []
    for prompt in ("turn left", "sing"):
        asked: list[Any] = [{"role": "system", "content": "you fly"}, {"role": "user", "content": prompt}]
        completion = client.chat.completions.create(
            model=model, messages=asked, max_tokens=500, temperature=0.0, stop=None, tools=functions, seed=42,
            tool_choice="required",
        )  # fmt: skip
        calls = completion.choices[0].message.tool_calls
        assert calls and completion.usage and completion.usage.total_tokens
        function: Any = calls[0]
        called.append(function.function.name)
    return called


def test_function_calling(client: OpenAI, tmp_path: Path) -> None:
    assert set(eval_calls(client, "gpt-3.5-turbo", FUNCTIONS)) <= {"fly", "reject"}
    step("tools with tool_choice=required and a seed: the baseline")
    prompts: list[Any] = [{"role": "user", "content": "two commands that fly left"}]
    synthetic = client.chat.completions.create(model="gpt-4o", messages=prompts, temperature=0.8, max_tokens=20)
    assert synthetic.choices[0].message.content
    step("prompts are made up by a larger model")

    shorter = json.loads(json.dumps(FUNCTIONS))
    for function in shorter:
        function["function"].pop("description", None)
        for parameter in function["function"]["parameters"]["properties"].values():
            parameter.pop("description", None)

    def row(prompt: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"id": "call_id", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        turns = [{"role": "system", "content": "you fly"}, {"role": "user", "content": prompt}]
        messages = [*turns, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": messages, "parallel_tool_calls": False, "tools": shorter}

    rows = [row(f"turn left {n}", "fly", {"direction": "left"}) for n in range(6)]
    rows += [row(f"sing {n}", "reject", {}) for n in range(6)]
    path = tmp_path / "drone_training.jsonl"
    path.write_bytes(jsonl(*rows))
    with path.open("rb") as training:
        file = client.files.create(file=training, purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    step("rows with tool_calls, tools without descriptions and parallel_tool_calls")
    job = client.fine_tuning.jobs.create(model="gpt-3.5-turbo", training_file=file.id, suffix="drone")
    assert job.id in [each.id for each in client.fine_tuning.jobs.list(limit=10)]
    step("jobs.create of calls, and jobs.list")
    done = ended(client, job.id)
    assert client.fine_tuning.jobs.list_events(fine_tuning_job_id=job.id, limit=10).data
    assert done.fine_tuned_model is not None
    assert set(eval_calls(client, done.fine_tuned_model, shorter)) <= {"fly", "reject"}
    step("the fine-tuned model is evaluated as the baseline was")
    content = client.files.content(file_id=done.result_files[0]).read()
    with pytest.raises(ValueError, match="base64"):  # the one step that does not work: what comes is the CSV itself
        base64.b64decode(content, validate=True)
    assert len(result_rows(content.decode())) > 1
    other = client.fine_tuning.jobs.create(model="gpt-3.5-turbo", training_file=file.id, suffix="other")
    assert client.fine_tuning.jobs.cancel(other.id).id == other.id
    wait_until(lambda: client.fine_tuning.jobs.retrieve(other.id).status == "cancelled")  # it held the base
    step("jobs.cancel")
    client.models.delete(done.fine_tuned_model)
    step("models.delete")

    older = [
        {
            "messages": [
                {"role": "user", "content": "turn left"},
                {"role": "assistant", "function_call": {"name": "fly", "arguments": '{"direction": "left"}'}},
            ],
            "functions": [function["function"] for function in shorter],
        }
    ]
    file = client.files.create(file=("older.jsonl", jsonl(*older)), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    step("rows in the older form: functions and function_call")


def test_direct_preference_optimisation(client: OpenAI) -> None:
    def pair(number: int) -> dict[str, Any]:
        asked = [{"role": "system", "content": "you help"}, {"role": "user", "content": f"when is it {number}"}]
        return {
            "input": {"messages": asked},
            "preferred_output": [{"role": "assistant", "content": "so glad that you ask!"}],
            "non_preferred_output": [{"role": "assistant", "content": "later."}],
        }

    pairs = [pair(number) for number in range(20)]
    train, validation = pairs[:16], pairs[16:]
    files = []
    for name, rows in (("train.jsonl", train), ("val.jsonl", validation)):
        buffer = io.BytesIO("\n".join(json.dumps(row) for row in rows).encode())
        buffer.name = name
        files.append(client.files.create(file=buffer, purpose="fine-tune").id)
    step("files.create from memory, without a line break at the end")
    base_model = "gpt-4.1-mini-2025-04-14"
    job = client.fine_tuning.jobs.create(
        model=base_model,
        training_file=files[0],
        validation_file=files[1],
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "beta": 0.1, "batch_size": 8}}},
    )
    step("jobs.create with method dpo, n_epochs, beta and batch_size")
    done = ended(client, job.id)
    assert done.fine_tuned_model is not None and done.method is not None and done.method.type == "dpo"
    step("jobs.retrieve until it has succeeded")
    rows = result_rows(client.files.content(done.result_files[0]).read().decode())
    assert len(rows) == 4 and [row["step"] for row in rows if row["valid_loss"]] == ["2", "4"]
    step("the result file of preferences")
    asked: list[Any] = train[0]["input"]["messages"]
    both = [
        client.chat.completions.create(model=name, messages=asked, temperature=0, max_tokens=8).choices[0]
        for name in (base_model, done.fine_tuned_model)
    ]
    assert all(choice.message.content is not None for choice in both)
    step("base and fine-tuned model answer the test prompts by chat")
    answers = [{"messages": [*pair["input"]["messages"], *pair["preferred_output"]]} for pair in train]
    file = client.files.create(file=("sft.jsonl", jsonl(*answers)), purpose="fine-tune")
    first = client.fine_tuning.jobs.create(
        model=base_model,
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    )
    taught = ended(client, first.id).fine_tuned_model
    assert taught is not None
    then = client.fine_tuning.jobs.create(
        model=taught,
        training_file=files[0],
        validation_file=files[1],
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "beta": 0.1}}},
    )
    both_ways = ended(client, then.id)
    assert both_ways.model == taught and both_ways.fine_tuned_model not in (None, taught)
    first_loss = result_rows(client.files.content(both_ways.result_files[0]).read().decode())[0]["train_loss"]
    assert float(first_loss) == pytest.approx(0.6931, abs=1e-3)  # compared with the first fine-tune, not with the base
    step("jobs.create with method dpo on a model that was fine-tuned on answers first")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=base_model, input="when is it")
    with pytest.raises(openai.NotFoundError):
        client.evals.list()


def test_distillation(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"variety": {"type": "string", "enum": ["Gamay", "Pinot Noir", "Rosé"]}},
        "additionalProperties": False,
        "required": ["variety"],
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "grape-variety", "schema": schema, "strict": True}}
    asked: list[Any] = [{"role": "user", "content": "which grape is it"}]
    answer = client.chat.completions.create(
        model="gpt-4o", metadata={"distillation": "wine"}, messages=asked, response_format=form
    )
    assert json.loads((answer.choices[0].message.content or "").strip())["variety"] in ("Gamay", "Pinot Noir", "Rosé")
    step("structured outputs with an enum, and metadata")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="gpt-4o", store=True, messages=asked)
    assert refused.value.param == "store"


def test_the_table_is_what_was_run(request: pytest.FixtureRequest) -> None:
    ran = {item.name for item in request.session.items if item.path == Path(__file__)}
    if len(ran) < 5:
        pytest.skip("only some of the steps were run")
    section = DOCS.read_text("utf-8").partition("## The cookbook's flows")[2].partition("\n## ")[0]
    fine_tuning, _, others = section.partition("| **Calls of other APIs")
    own, beyond = (
        dict(re.findall(r"^\| ([^|]+?) \| (yes|no)\b", part, re.MULTILINE)) for part in (fine_tuning, others)
    )
    assert {name for name, works in (own | beyond).items() if works == "yes"} == DONE
    assert len(DONE & own.keys()) / len(own) >= 0.95, own
    assert set(beyond.values()) == {"no"} and len(beyond) == 3  # asked for in the tests above, and refused
    assert f"{len(DONE)} of the {len(own)} steps" in section and f"{len(DONE)} of all {len(own | beyond)}" in section
