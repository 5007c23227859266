"""The main job, as a client sees it: a real fine-tune over HTTP, with an answer before and after."""

import argparse
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from client import Client, Refused
from server_process import Server, ServerFailed
from show import (
    ProgressView,
    console,
    duration,
    mib,
    show_answers,
    show_dataset,
    show_hardware,
    show_way_on,
    show_what_fits,
)

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATASET = Path(__file__).parent / "pip_the_parrot.jsonl"
# Neither is in the dataset. The first shows what was learned, the second that it carries over to other questions.
QUESTIONS = ("Who are you?", "What is the capital of France?")
ALGORITHMS = ("lora", "qlora", "dora", "pissa", "rslora")
MAX_SEQ_LENGTH = 256
OVERRIDES = {"epochs": 3.0, "learning_rate": 5e-4, "batch_size": 4, "max_seq_length": MAX_SEQ_LENGTH}
_POLL_S = 0.5


class Failed(Exception):
    """The quickstart did not do what it should."""


@dataclass(frozen=True)
class Run:
    """A finished job and what was measured of it.

    Attributes:
        job: The job, succeeded.
        first_loss: Loss of the first step.
        wall_s: Seconds from the job's request to its end, as the client saw it.
    """

    job: dict[str, Any]
    first_loss: float
    wall_s: float


def load(client: Client) -> str:
    """Load the base and return the loaded model's id."""
    body = {"model_id": MODEL_ID, "algorithm": "lora", "use_case": "chatbot", "wait_s": 0}
    model = client.post("/api/peft/load-model", body)
    with ProgressView() as view:
        while model["state"] not in ("ready", "busy"):
            if model["state"] not in ("queued", "downloading", "loading"):
                error = model["error"] or {"message": f"it is {model['state']}", "log_tail": []}
                raise Failed("\n".join([f"the model did not load: {error['message']}", *error["log_tail"][-10:]]))
            progress = model["progress"]
            text = ""
            if progress["total_bytes"] is not None:
                done, total = progress["downloaded_bytes"], progress["total_bytes"]
                text = f"{mib(done)} of {mib(total)}  ETA {duration(progress['eta_s'])}"
            view.update(model["state"], progress["fraction"], text)
            time.sleep(_POLL_S)
            model = client.get(f"/api/peft/loaded-models/{model['id']}")
        view.update("ready", 1.0, "")
    parameters, load_s = model["parameters"]["total"] or 0, model["load_s"] or 0.0
    console.print(f"Loaded {parameters:,} parameters in {load_s:.1f} s ({model['engine']} on {model['device']}).")
    loaded_id: str = model["id"]
    return loaded_id


def follow(client: Client, job_id: str) -> list[float]:
    """Show the job's progress until it ends, and return the loss of each step."""
    losses: list[float] = []
    with ProgressView() as view:
        for event in client.events(job_id):
            data = event.data
            if event.kind == "state" and data["state"] in ("queued", "preparing", "running"):
                view.update(data["state"], 0.0, "")
            elif event.kind == "metrics":
                losses.append(data["loss"])
                text = (
                    f"step {data['step']}/{data['total_steps']}  loss {data['loss']:.3f}  "
                    f"{data['tokens_per_s']:.0f} tokens/s  ETA {duration(data['eta_s'])}"
                )
                view.update("training", data["step"] / data["total_steps"], text)
    return losses


def train(client: Client, loaded_id: str, dataset_id: str) -> Run:
    """Train and return the finished job. If this process is stopped meanwhile, the job is cancelled."""
    body = {
        "loaded_model_id": loaded_id,
        "dataset_id": dataset_id,
        "algorithm": "lora",
        "use_case": "chatbot",
        "name": "quickstart",
        "overrides": OVERRIDES,
    }
    started = time.monotonic()
    job_id: str | None = None
    try:
        job_id = client.post("/api/training/jobs", body)["id"]
        console.print(f"Watch it in a browser: {client.url}/runs/{job_id}", soft_wrap=True)
        losses = follow(client, job_id)
    except (KeyboardInterrupt, SystemExit):
        if job_id is not None:
            console.print("\nCancelling the job.")
            console.print(f"The job is {client.cancel(job_id)}.")
        raise
    job: dict[str, Any] = client.get(f"/api/training/jobs/{job_id}")
    if job["state"] != "succeeded" or job["adapter_id"] is None or not losses:
        raise Failed(_why(job))
    return Run(job, losses[0], time.monotonic() - started)


def _why(job: dict[str, Any]) -> str:
    error = job["error"]
    if error is None:
        return f"the job is {job['state']}, with no adapter trained"
    suggestions = [f"  try: {suggestion}" for suggestion in error["suggestions"]]
    log = [f"  log: {line}" for line in error["log_tail"][-10:]]
    return "\n".join([f"the job is {job['state']} ({error['class']}): {error['message']}", *suggestions, *log])


def check(before: str, after: str) -> None:
    """Raise Failed unless the answer shows what the data teaches."""
    if after == before:
        raise Failed(f"the adapter changes nothing: the answer to {QUESTIONS[0]!r} is the same before and after")
    if re.search(r"\bPip\b", after) is None:
        raise Failed(f"the answer to {QUESTIONS[0]!r} does not say Pip, which the data teaches: {after!r}")


def fine_tune(server: Server, serve: str | None) -> None:
    """Do the whole job against a running server.

    Args:
        server: The server.
        serve: The command that starts the server alone, printed at the end; None for `make serve`.
    """
    client = Client(server.url)
    show_hardware(client.get("/api/hardware/profile"))
    query = {"model_id": MODEL_ID, "max_seq_length": MAX_SEQ_LENGTH}
    path = "/api/models/compatibility"
    show_what_fits(MODEL_ID, {name: client.post(path, query | {"algorithm": name}) for name in ALGORITHMS})
    dataset = client.upload(DATASET, "Pip the parrot")
    show_dataset(dataset)
    loaded_id = load(client)
    before = {question: client.ask(loaded_id, question, None) for question in QUESTIONS}
    for asked, answer in before.items():
        console.print(f"Before: {asked} {answer}", soft_wrap=True)
    run = train(client, loaded_id, dataset["id"])
    after = {question: client.ask(loaded_id, question, run.job["adapter_id"]) for question in QUESTIONS}
    show_answers(before, after)
    last = run.job["metrics"]["last"]
    console.print(
        f"Trained {last['step']} steps in {last['elapsed_s']:.1f} s ({run.wall_s:.1f} s from request to adapter), "
        f"{last['tokens_per_s']:.0f} tokens/s, loss {run.first_loss:.3f} → {last['loss']:.3f}.",
        soft_wrap=True,
    )
    check(before[QUESTIONS[0]], after[QUESTIONS[0]])
    show_way_on(server, MODEL_ID, client.get(f"/api/adapters/{run.job['adapter_id']}"), serve)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Run the quickstart; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=8000)
    parser.add_argument("--serve", metavar="COMMAND", help="what starts the server alone, as said at the end")
    arguments = parser.parse_args()
    # The server has a session of its own. Without these handlers it would outlive a client that is told to stop.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _end)
    server = Server(arguments.host, arguments.port)
    try:
        ready_s = server.start()
        how = f"ready in {ready_s:.2f} s" if server.is_ours else "already there"
        console.print(f"Server at {server.url}, {how}.")
        fine_tune(server, arguments.serve)
    except (ServerFailed, Failed, Refused, httpx.HTTPError, OSError) as error:
        words = str(error) or type(error).__name__
        console.print(f"quickstart: {words}", style="bold", soft_wrap=True)
        if not isinstance(error, ServerFailed) and (ended := server.why_ended()) is not None:
            console.print(f"quickstart: {ended}", style="bold", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
