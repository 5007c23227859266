"""Prints the quickstart's tables, its progress, and the commands to go on with."""

import math
import os
import shlex
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from server_process import Server

_MIB = 2**20

# The texts come from a model or a server, so they are not read as mark-up.
console = Console(highlight=False, markup=False, emoji=False)


class ProgressView:
    """A bar on a terminal. Elsewhere, as in a CI log, it is a line for each tenth and each change of label."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
        text = TextColumn("{task.fields[text]}", markup=False)
        label = TextColumn("{task.description}", markup=False)
        self._progress = Progress(label, BarColumn(), text, console=console, disable=not self._live)
        self._task: TaskID = self._progress.add_task("", total=None, text="")
        self._printed: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, label: str, fraction: float | None, text: str) -> None:
        """Show how far it is.

        Args:
            label: What is going on.
            fraction: 0..1, or None where it is not known.
            text: The details.
        """
        if self._live:
            total = None if fraction is None else 1.0
            self._progress.update(self._task, description=label, total=total, completed=fraction or 0.0, text=text)
            return
        # The small number makes 3 of 10 the third tenth despite rounding.
        mark = (label, math.floor(10 * (fraction or 0.0) + 1e-9))
        if mark != self._printed:
            self._printed = mark
            percent = "" if fraction is None else f"{fraction:4.0%}"
            console.print("  ".join(part for part in (label, percent, text) if part), soft_wrap=True)


def mib(size_bytes: int | None) -> str:
    """Write a size in MiB."""
    return "unknown" if size_bytes is None else f"{size_bytes / _MIB:,.0f} MiB"


def duration(seconds: float | None) -> str:
    """Write a duration as minutes:seconds."""
    return "?" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def show_hardware(profile: dict[str, Any]) -> None:
    """Print what the server knows of the machine."""
    cpu, memory = profile["cpu"], profile["memory"]
    gpus = [f"{gpu['name'] or 'unknown'} ({mib(gpu['memory_total_bytes'])})" for gpu in profile["gpus"]]
    table = Table("hardware", "", title="This machine", title_justify="left")
    table.add_row("CPU", cpu["model"] or cpu["architecture"])
    table.add_row("cores", f"{cpu['logical_cores']} logical, {cpu['physical_cores'] or 'unknown'} physical")
    table.add_row("memory", f"{mib(memory['available_bytes'])} free of {mib(memory['total_bytes'])}")
    table.add_row("GPUs", ", ".join(gpus) or "none")
    table.add_row("engine", f"{profile['engine']['name']}: {profile['engine']['reason']}")
    console.print(table)


def show_what_fits(model_id: str, answers: dict[str, dict[str, Any]]) -> None:
    """Print the verdict on each method, and the reasons against the model."""
    columns = ("method", "verdict", "estimated peak", "available")
    table = Table(*columns, title=f"What fits: {model_id}", title_justify="left")
    for algorithm, answer in answers.items():
        estimate = answer["estimate"] or {}
        peak = mib(estimate.get("total_bytes"))
        table.add_row(algorithm, answer["verdict"].replace("_", " "), peak, mib(answer["available_bytes"]))
    console.print(table)
    for blocker in dict.fromkeys(blocker for answer in answers.values() for blocker in answer["blockers"]):
        console.print(f"  {blocker}")


def show_dataset(dataset: dict[str, Any]) -> None:
    """Print how the server has read the file."""
    console.print(f"Uploaded {dataset['rows']} rows, recognised as {dataset['format']} ({dataset['id']}).")
    for warning in dataset["warnings"]:
        console.print(f"  warning: {warning}")


def show_answers(before: dict[str, str], after: dict[str, str]) -> None:
    """Print both answers to each question side by side."""
    table = Table("question", "before", "after", show_lines=True, title="Before and after", title_justify="left")
    for question, answer in before.items():
        table.add_row(question, answer, after[question])
    console.print(table)


def show_way_on(server: Server, model_id: str, adapter: dict[str, Any], serve: str | None) -> None:
    """Print where the adapter is, and the commands to take it further.

    Args:
        server: The server that trained it.
        model_id: Its base.
        adapter: The adapter, as the server describes it.
        serve: The command that starts the server alone, with a key; None for `make serve`.
    """
    url = server.url
    curl = "curl -fsS"
    if serve is not None or any(map(os.environ.get, ("PEFT_STUDIO_API_KEY", "PEFT_STUDIO_API_KEY_FILE"))):
        curl += ' -H "Authorization: Bearer $PEFT_STUDIO_API_KEY"'
    post = f"{curl} -H 'Content-Type: application/json'"
    host, _, port = url.removeprefix("http://").rpartition(":")
    serve = serve or f"PEFT_STUDIO_HOME={shlex.quote(str(server.home))} make serve HOST={host.strip('[]')} PORT={port}"
    lines = [
        f"\nThe adapter is in {adapter['path']}",
        "\nGo on:",
        f"  {serve}   # in another terminal" if server.is_ours else "  the server that was there is still running",
        f"  {url}   # in a browser; the API's document is {url}/docs",
        "\nDownload the adapter:",
        f"  {curl} -o adapter.zip {url}/api/adapters/{adapter['id']}/download",
        "\nChat with it:",
        f"  LOADED=$({post} {url}/api/peft/load-model \\",
        f'    -d \'{{"model_id": "{model_id}", "use_case": "chatbot", "wait_s": 120}}\' \\',
        "    | python3 -c 'import json, sys; print(json.load(sys.stdin)[\"id\"])')",
        f"  {post} {url}/api/peft/loaded-models/$LOADED/generate \\",
        f'    -d \'{{"adapter_id": "{adapter["id"]}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}\'',
    ]
    console.print("\n".join(lines), soft_wrap=True)
