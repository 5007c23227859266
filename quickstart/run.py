"""The main job, as a client sees it: a real fine-tune over HTTP, with an answer before and after."""

import argparse
import sys
from pathlib import Path
from typing import Any

import httpx
from client import Client, Refused
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from server_process import Server, ServerFailed

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATASET = Path(__file__).parent / "pip_the_parrot.jsonl"
# Neither is in the dataset: the first shows what was learned, the second that it carries over.
QUESTIONS = ("Who are you?", "What is the capital of France?")
ALGORITHMS = ("lora", "qlora", "dora", "pissa", "rslora")
MAX_SEQ_LENGTH = 256
OVERRIDES = {"epochs": 3.0, "learning_rate": 5e-4, "batch_size": 4, "max_seq_length": MAX_SEQ_LENGTH}
_MIB = 2**20

console = Console(highlight=False)


class Failed(Exception):
    """The quickstart did not do what it should."""


def show_hardware(client: Client) -> None:
    """Print what the server knows of the machine."""
    profile = client.get("/api/hardware/profile")
    cpu, memory = profile["cpu"], profile["memory"]
    gpus = [f"{gpu['name']} ({(gpu['memory_total_bytes'] or 0) // _MIB} MiB)" for gpu in profile["gpus"]] or ["none"]
    table = Table("hardware", "", title="This machine", title_justify="left")
    table.add_row("CPU", f"{cpu['model']}, {cpu['logical_cores']} cores")
    table.add_row("memory", f"{memory['available_bytes'] // _MIB} of {memory['total_bytes'] // _MIB} MiB free")
    table.add_row("GPUs", ", ".join(gpus))
    table.add_row("engine", f"{profile['engine']['name']}: {profile['engine']['reason']}")
    console.print(table)


def show_what_fits(client: Client) -> None:
    """Print the verdict of each method before anything is downloaded."""
    table = Table("method", "verdict", "estimated peak", "free", title=f"What fits: {MODEL_ID}", title_justify="left")
    for algorithm in ALGORITHMS:
        body = {"model_id": MODEL_ID, "algorithm": algorithm, "max_seq_length": MAX_SEQ_LENGTH}
        answer = client.post("/api/models/compatibility", body)
        peak = f"{answer['estimate']['total_bytes'] // _MIB} MiB"
        table.add_row(algorithm, answer["verdict"], peak, f"{(answer['available_bytes'] or 0) // _MIB} MiB")
    console.print(table)


def load(client: Client) -> str:
    """Load the base and return the loaded model's id."""
    model = client.post("/api/peft/load-model", {"model_id": MODEL_ID, "use_case": "chatbot"})
    with _bar("{task.description}") as progress:
        task = progress.add_task("loading", total=1.0)
        while model["state"] not in ("ready", "busy"):
            if model["state"] == "failed":
                raise Failed(f"the model did not load: {model['error']['message']}")
            fraction = model["progress"]["fraction"]
            progress.update(task, completed=fraction or 0.0, description=model["state"])
            model = client.post("/api/peft/load-model", {"model_id": MODEL_ID, "use_case": "chatbot", "wait_s": 1})
        progress.update(task, completed=1.0, description="ready")
    parameters = model["parameters"]["total"]
    console.print(f"Loaded {parameters:,} parameters in {model['load_s']:.1f} s ({model['device']}).")
    loaded_id: str = model["id"]
    return loaded_id


def _bar(*text: str) -> Progress:
    columns = [TextColumn(part) for part in text]
    return Progress(columns[0], BarColumn(), *columns[1:], TimeRemainingColumn(), console=console)


def follow(client: Client, job_id: str) -> dict[str, Any]:
    """Draw the job's progress until it ends, and return the job."""
    marks = -1
    with _bar("training", "step {task.completed:.0f}/{task.total:.0f}", "{task.fields[text]}") as progress:
        task = progress.add_task("training", total=1, text="")
        for event in client.events(job_id):
            data = event.data
            if event.kind == "started":
                progress.update(task, total=data["total_steps"])
            elif event.kind == "metrics":
                text = f"loss {data['loss']:.3f}  {data['tokens_per_s']:.0f} tokens/s"
                progress.update(task, completed=data["step"], text=text)
                tenth = 10 * data["step"] // data["total_steps"]
                if not console.is_terminal and tenth > marks:
                    marks = tenth
                    console.print(f"step {data['step']}/{data['total_steps']}  {text}  ETA {data['eta_s']:.0f} s")
    job: dict[str, Any] = client.get(f"/api/training/jobs/{job_id}")
    if job["state"] != "succeeded":
        error = job["error"] or {"message": "", "suggestions": [], "log_tail": []}
        lines = [*error["suggestions"], *error["log_tail"][-10:]]
        raise Failed(f"the job is {job['state']}: {error['message']}\n" + "\n".join(lines))
    return job


def train(client: Client, loaded_id: str) -> dict[str, Any]:
    """Upload the dataset, train, and return the finished job. Ctrl-C cancels the job."""
    dataset = client.upload(DATASET, "Pip the parrot")
    console.print(f"Uploaded {dataset['rows']} rows, recognised as {dataset['format']}.")
    body = {
        "loaded_model_id": loaded_id,
        "dataset_id": dataset["id"],
        "algorithm": "lora",
        "use_case": "chatbot",
        "name": "quickstart",
        "overrides": OVERRIDES,
    }
    job = client.post("/api/training/jobs", body)
    try:
        return follow(client, job["id"])
    except KeyboardInterrupt:
        client.post(f"/api/training/jobs/{job['id']}/cancel", {})
        raise


def show_difference(before: dict[str, str], after: dict[str, str]) -> None:
    """Print both answers side by side; fail if nothing was learned."""
    table = Table("question", "before", "after", show_lines=True)
    for question in QUESTIONS:
        table.add_row(question, before[question], after[question])
    console.print(table)
    first = QUESTIONS[0]
    if "Pip" not in after[first] or "Pip" in before[first]:
        raise Failed(f"the answer to {first!r} does not show what the data teaches")


def show_result(client: Client, url: str, job: dict[str, Any], loaded_id: str) -> None:
    """Print the figures, where the adapter is, and how to go on."""
    last, rows = job["metrics"]["last"], client.get(f"/api/training/jobs/{job['id']}/metrics")["metrics"]
    console.print(
        f"Trained {last['step']} steps in {last['elapsed_s']:.0f} s at {last['tokens_per_s']:.0f} tokens/s; "
        f"loss {rows[0]['loss']:.3f} → {last['loss']:.3f}."
    )
    adapter = client.get(f"/api/adapters/{job['adapter_id']}")
    console.print(f"\nThe adapter is in {adapter['path']}", soft_wrap=True)
    chat = (
        f"LOADED=$(curl -s {url}/api/peft/load-model -H 'Content-Type: application/json' \\\n"
        f"    -d '{{\"model_id\": \"{MODEL_ID}\", \"wait_s\": 120}}' | "
        "python3 -c 'import json, sys; print(json.load(sys.stdin)[\"id\"])')\n"
        f"curl {url}/api/peft/loaded-models/$LOADED/generate -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"adapter_id": "{adapter["id"]}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}\''
    )
    console.print(
        "Go on:\n"
        "  make serve            # in another terminal; PEFT_STUDIO_HOME as here\n"
        f"  open {url}/docs\n\n"
        f"curl -o adapter.zip {url}/api/adapters/{adapter['id']}/download\n{chat}",
        soft_wrap=True,
        markup=False,
    )


def fine_tune(server: Server) -> None:
    """Do the whole job against a running server."""
    client = Client(server.url)
    show_hardware(client)
    show_what_fits(client)
    loaded_id = load(client)
    before = {question: client.ask(loaded_id, question, None) for question in QUESTIONS}
    job = train(client, loaded_id)
    after = {question: client.ask(loaded_id, question, job["adapter_id"]) for question in QUESTIONS}
    show_difference(before, after)
    show_result(client, server.url, job, loaded_id)


def main() -> int:
    """Run the quickstart; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    server = Server(arguments.host, arguments.port)
    try:
        ready_s = server.start()
        console.print(f"Server at {server.url}" + (f", ready in {ready_s:.2f} s." if server.is_ours else ", already up."))
        fine_tune(server)
    except (ServerFailed, Failed, Refused, httpx.HTTPError) as error:
        console.print(f"quickstart: {error}", style="bold", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
