"""`python -m reproduce <adapter folder or zip>`: train an adapter again from its card, and compare.

It asks a running server (`--server`) to train with the card's base, data and settings, and compares the losses and the
weights. Exit code: 0 if they are the same, 1 if they differ, 2 if there is nothing to compare.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_WEIGHTS = "adapter_model.safetensors"
_FIGURES = ("steps", "tokens", "first_loss", "final_loss", "initial_eval_loss", "final_eval_loss", "best_eval_loss")
# Another processor, GPU or version sums in another order; over a run the differences grow.
_RELATIVE_TOLERANCE = 0.05
_POLL_S = 1.0


class CannotReproduce(Exception):
    """What the run needs is not there."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's card, and the sha256 of its weights."""

    card: dict[str, Any]
    weights_sha256: str


def read_adapter(path: Path) -> Adapter:
    """Read a folder or a zip.

    Raises:
        CannotReproduce: It is no adapter with a card.
    """
    try:
        if path.is_dir():
            card, weights = (path / "training.json").read_bytes(), (path / _WEIGHTS).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                card, weights = archive.read("training.json"), archive.read(_WEIGHTS)
        found = json.loads(card)
        for name in ("config", "outcome", "packages", "machine", "rows_sha256", "base_model_id", "algorithm"):
            found[name]
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise CannotReproduce(f"{path} is no adapter with a card to train it from: {error!r}") from error
    return Adapter(found, hashlib.sha256(weights).hexdigest())


class Server:
    """The server that trains."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=120)

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Ask.

        Raises:
            CannotReproduce: It refuses, or does not answer; the message says why.
        """
        try:
            response = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise CannotReproduce(f"The server at {self._http.base_url} does not answer: {error}") from error
        if response.is_error:
            raise CannotReproduce(f"{method} {path}: {response.json().get('detail', response.text)}")
        return response

    def dataset(self, about: Mapping[str, Any] | None, rows_sha256: str, given: str | None) -> str:
        """Return the id of the dataset that the card means: one that is there, or the file that is given.

        Raises:
            CannotReproduce: There is none, or its rows are others.
        """
        about = about or {}
        known = self.call("GET", "/api/datasets").json()["datasets"]
        if given is not None and Path(given).is_file():
            candidates = [self._upload(Path(given), about)]
        elif given is not None:
            candidates = [given]
        else:
            candidates = [entry["id"] for entry in known if entry["sha256"] == about.get("sha256")]
        for dataset_id in candidates:
            rows = self.call("GET", f"/api/datasets/{dataset_id}/download", params={"form": "normalised"}).content
            if hashlib.sha256(rows).hexdigest() == rows_sha256:
                return dataset_id
        if given is not None:
            raise CannotReproduce(f"{given} has other rows than those of the card (sha256 {rows_sha256}).")
        raise CannotReproduce(
            f"The server has no dataset {about.get('name')!r} (sha256 {about.get('sha256')}): name a file or an id."
        )

    def _upload(self, path: Path, about: Mapping[str, Any]) -> str:
        settings = {name: value for name, value in (about.get("settings") or {}).items() if value is not None}
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
        form["name"] = str(about.get("name") or path.name)
        with path.open("rb") as file:
            answer = self.call("POST", "/api/datasets", files={"file": (path.name, file)}, data=form)
        return str(answer.json()["id"])

    def train(self, card: Mapping[str, Any], dataset_id: str, validation_id: str | None) -> dict[str, Any]:
        """Train as the card says, and return the job.

        Raises:
            CannotReproduce: The job does not succeed.
        """
        request = {
            "model_id": card["base_model_id"],
            "revision": card.get("base_commit") or card.get("base_revision"),
            "algorithm": card["algorithm"],
            "overrides": card["config"],
            "dataset_id": dataset_id,
            "validation_dataset_id": validation_id,
            "validation_fraction": 0 if validation_id else card["validation_fraction"],
            "name": f"reproduction of {card['adapter_id']}"[:200],
        }
        job = dict(self.call("POST", "/api/training/jobs", json=request).json())
        say(f"Training as {job['id']}.")
        shown = ""
        while job["state"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(_POLL_S)
            job = dict(self.call("GET", f"/api/training/jobs/{job['id']}").json())
            progress = job["progress"]
            line = f"  {job['state']}: step {progress['step']} of {progress['total_steps'] or '…'}"
            if line != shown:
                say(line)
            shown = line
        if job["state"] != "succeeded":
            raise CannotReproduce(f"The job {job['id']} is {job['state']}: {(job['error'] or {}).get('message')}")
        return job

    def adapter(self, job: Mapping[str, Any]) -> Adapter:
        """Return the adapter that a job made."""
        content = self.call("GET", f"/api/adapters/{job['adapter_id']}/download").content
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            weights = hashlib.sha256(archive.read(_WEIGHTS)).hexdigest()
            return Adapter(json.loads(archive.read("training.json")), weights)


def differences(first: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """Name what is not the same about two machines and their packages."""
    return [
        f"{name} {first[part].get(name)} → {again[part].get(name)}"
        for part in ("packages", "machine")
        for name in sorted(first[part].keys() | again[part].keys())
        if first[part].get(name) != again[part].get(name)
    ]


def compare(first: Adapter, again: Adapter, tolerance: float | None) -> bool:
    """Print how two trainings compare; tell whether they are the same as far as they can be.

    Args:
        tolerance: Of losses, relative; None to ask for the same bits where nothing stands against them.
    """
    unlike = differences(first.card, again.card)
    exact = tolerance is None and not unlike and first.card["machine"]["device"] == "cpu"
    allowed = 0.0 if exact else _RELATIVE_TOLERANCE if tolerance is None else tolerance
    if unlike:
        say(f"Not the same here as there: {'; '.join(unlike)}.")
    same = True
    for name in _FIGURES:
        one, other = first.card["outcome"].get(name), again.card["outcome"].get(name)
        close = _close(one, other, allowed)
        same = same and close
        say(f"  {name:18} {one!s:24} {other!s:24} {'same' if one == other else 'close' if close else 'DIFFERENT'}")
    losses = dict(map(tuple, again.card["losses"]))
    pairs = [(loss, losses[step]) for step, loss in first.card["losses"] if step in losses]
    equal, close_ones = sum(a == b for a, b in pairs), sum(_close(a, b, allowed) for a, b in pairs)
    worst = max((abs(a - b) for a, b in pairs), default=0.0)
    say(f"  losses of {len(pairs)} steps: {equal} the same to the bit, largest difference {worst:.3g}")
    bits = first.weights_sha256 == again.weights_sha256
    say(f"  weights: {'the same to the bit' if bits else 'not the same bits'} (sha256 {again.weights_sha256})")
    same = same and close_ones == len(pairs) and (bits or not exact)
    wanted = "the same bits" if exact else f"losses within {allowed:g} of each other"
    say(f"{'Reproduced' if same else 'NOT reproduced'}: {wanted} {'were' if same else 'were not'} found.")
    return same


def _close(one: float | None, other: float | None, relative: float) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= relative * max(abs(one), abs(other))


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 - it is what the command is for


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m reproduce", description="Train an adapter again and compare.")
    parser.add_argument("adapter", type=Path, help="the adapter's folder, or its zip")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="a running server")
    parser.add_argument("--dataset", help="the dataset's file, or its id on the server; found by its sha256 otherwise")
    parser.add_argument("--validation-dataset", help="the same for the validation dataset, if there was one")
    parser.add_argument(
        "--tolerance", type=float, help="largest relative difference of losses, in place of the same bits"
    )
    given = parser.parse_args(arguments)
    try:
        first = read_adapter(given.adapter)
        card = first.card
        server = Server(given.server, os.environ.get("PEFT_STUDIO_API_KEY"))
        dataset_id = server.dataset(card.get("dataset"), card["rows_sha256"], given.dataset)
        validation_id = None
        if card.get("validation_rows_sha256"):
            about = card.get("validation_dataset")
            validation_id = server.dataset(about, card["validation_rows_sha256"], given.validation_dataset)
        say(f"{card['algorithm']} on {card['base_model_id']}, dataset {dataset_id}, seed {card['config']['seed']}.")
        again = server.adapter(server.train(card, dataset_id, validation_id))
    except CannotReproduce as error:
        print(f"reproduce: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0 if compare(first, again, given.tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
