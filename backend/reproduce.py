"""`python -m reproduce <adapter folder or zip>`: train an adapter again from its card, and compare.

A running server (`--server`) trains with the card's base, data and settings. The command compares the losses and the
weights. Exit code: 0 if they are the same, 1 if they differ, 2 if there is nothing to compare.
"""

import argparse
import hashlib
import io
import json
import lzma
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, NotRequired

import httpx
from pydantic import AfterValidator, ConfigDict, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

_WEIGHTS, _CARD_NAME = "adapter_model.safetensors", "training.json"
_FIGURES = ("steps", "tokens", "first_loss", "final_loss", "initial_eval_loss", "final_eval_loss", "best_eval_loss")
# Another processor, GPU or version adds numbers in another order. The differences grow over a run.
_RELATIVE_TOLERANCE = 0.05
_POLL_S = 1.0
_AWAY_S = 120.0  # a server that restarts takes its jobs up again
_MAX_CARD_BYTES = 16 * 2**20
# The errors of reading a path that is no folder or zip, or a damaged one.
_NOT_READ = (
    *(OSError, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
_CHUNK_BYTES = 2**20


def _printable(text: str) -> str:
    """Refuse control characters, which would steer a terminal. An adapter may come from anybody."""
    if not text.isprintable():
        raise ValueError("has characters that cannot be printed")
    return text


Plain = Annotated[str, StringConstraints(max_length=500), AfterValidator(_printable)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Figure = int | float | None


class DatasetCard(TypedDict):
    """A dataset, as a card describes it."""

    name: Plain
    sha256: Sha256
    settings: dict[str, Any]


class MachineCard(TypedDict):
    """The machine, as a card describes it. Everything in it can change the last bits of a result."""

    device: Plain
    engine: Plain
    threads: int
    architecture: Plain
    python: Plain
    cpu_capability: Plain


class RunCard(TypedDict):
    """The parts of an adapter's card (training.json) that are needed to train it again."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    adapter_id: Plain
    algorithm: Plain
    base_model_id: Plain
    base_revision: Plain | None
    base_commit: Plain | None
    resumed_from: Plain | None
    dataset: DatasetCard
    initial_adapter_id: NotRequired[Plain | None]
    validation_dataset: DatasetCard | None
    rows_sha256: Sha256
    validation_rows_sha256: Sha256 | None
    validation_fraction: float
    gpus: NotRequired[int]
    config: dict[str, Any]
    outcome: dict[Plain, Figure | bool]
    packages: dict[Plain, Plain]
    machine: MachineCard
    losses: list[tuple[int, float]]


_CARD = TypeAdapter(RunCard)


class CannotReproduce(Exception):
    """Something that the run needs is not there."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's card, and the sha256 of its weights."""

    card: RunCard
    weights_sha256: str


def read_adapter(path: Path | IO[bytes]) -> Adapter:
    """Read a folder or a zip.

    Raises:
        CannotReproduce: It is no adapter with a card, or the card is not of a whole run.
    """
    try:
        if isinstance(path, Path) and path.is_dir():
            with (path / _CARD_NAME).open("rb") as card, (path / _WEIGHTS).open("rb") as weights:
                return _read(card, weights)
        with zipfile.ZipFile(path) as archive, archive.open(_CARD_NAME) as card, archive.open(_WEIGHTS) as weights:
            return _read(card, weights)
    except _NOT_READ as error:
        raise CannotReproduce(f"{path} is no adapter with a card to train it from: {error}") from error


def _read(card: IO[bytes], weights: IO[bytes]) -> Adapter:
    text = card.read(_MAX_CARD_BYTES + 1)
    if len(text) > _MAX_CARD_BYTES:
        raise ValueError(f"{_CARD_NAME} is larger than {_MAX_CARD_BYTES} bytes")
    try:
        values = _CARD.validate_json(text)
    except ValidationError as error:  # its own text quotes what it refuses
        why = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{_CARD_NAME}: {why[:1000]}") from None
    json.dumps([values["config"], values["validation_fraction"]], allow_nan=False)  # they are sent
    if values["resumed_from"] is not None:
        raise CannotReproduce(
            f"The run began with the checkpoint {values['resumed_from']} of another job, which is not in the card."
        )
    if values.get("initial_adapter_id") is not None:
        raise CannotReproduce(
            f"The run began with the weights of the adapter {values['initial_adapter_id']}, which is not in the card."
        )
    if values["outcome"].get("stopped_on_request"):
        raise CannotReproduce(
            f"The run was ended by a client after step {values['outcome'].get('steps')}: no setting does that again."
        )
    return Adapter(values, _sha256(iter(lambda: weights.read(_CHUNK_BYTES), b"")))


def _sha256(chunks: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


class Server:
    """The server that trains."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A dataset of gigabytes is read before the answer comes.
        timeout = httpx.Timeout(_AWAY_S, read=3600)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send a request to the server.

        Raises:
            CannotReproduce: The server refuses, or does not answer. The message says why.
        """
        try:
            response = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise CannotReproduce(f"The server at {self._http.base_url} does not answer: {error}") from error
        if response.is_error:
            raise CannotReproduce(f"{method} {path}: {_detail(response)}")
        return response

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job. A server that is away for a time is waited for.

        Raises:
            CannotReproduce: The server refuses, or stays away.
        """
        deadline_s = time.monotonic() + _AWAY_S
        while True:
            try:
                return dict(self.call("GET", f"/api/training/jobs/{job_id}").json())
            except CannotReproduce as error:
                if not isinstance(error.__cause__, httpx.HTTPError) or time.monotonic() > deadline_s:
                    raise
                time.sleep(_POLL_S)

    def rows_sha256(self, dataset_id: str) -> str:
        """Return the sha256 of a dataset's rows as an engine reads them."""
        path, params = f"/api/datasets/{dataset_id}/download", {"form": "normalised"}
        try:
            with self._http.stream("GET", path, params=params) as response:
                if response.is_error:
                    response.read()
                    raise CannotReproduce(f"GET {path}: {_detail(response)}")
                return _sha256(response.iter_bytes())
        except httpx.HTTPError as error:
            raise CannotReproduce(f"GET {path}: {error}") from error

    def dataset(self, about: DatasetCard, rows_sha256: str, given: str | None) -> str:
        """Return the id of the card's dataset: one that the server has, or the file that is given.

        Raises:
            CannotReproduce: There is none, or its rows are others.
        """
        known = self.call("GET", "/api/datasets").json()["datasets"]
        if given is not None and Path(given).is_file():
            candidates = [self._upload(Path(given), about)]
        elif given is not None:
            candidates = [given]
        else:
            candidates = [entry["id"] for entry in known if entry["sha256"] == about["sha256"]]
        for dataset_id in candidates:
            if self.rows_sha256(dataset_id) == rows_sha256:
                return dataset_id
        if given is not None:
            raise CannotReproduce(f"{given} has other rows than those of the card (sha256 {rows_sha256}).")
        raise CannotReproduce(
            f"The server has no dataset {about['name']!r} (sha256 {about['sha256']}): name a file or an id."
        )

    def _upload(self, path: Path, about: DatasetCard) -> str:
        settings = {name: value for name, value in about["settings"].items() if value is not None}
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
        form["name"] = about["name"] or path.name
        with path.open("rb") as file:
            answer = self.call("POST", "/api/datasets", files={"file": (path.name, file)}, data=form)
        return str(answer.json()["id"])

    def train(self, card: RunCard, dataset_id: str, validation_id: str | None) -> dict[str, Any]:
        """Train as the card says, and return the job.

        Raises:
            CannotReproduce: The job does not succeed.
        """
        overrides = dict(card["config"])
        if overrides.get("max_steps") is not None:
            overrides.pop("epochs", None)  # without effect beside it, and what has none is refused
        request = {
            "model_id": card["base_model_id"],
            "revision": card["base_commit"] or card["base_revision"],
            "algorithm": card["algorithm"],
            "overrides": overrides,
            "dataset_id": dataset_id,
            "validation_dataset_id": validation_id,
            "validation_fraction": 0 if validation_id else card["validation_fraction"],
            "gpus": card.get("gpus", 1),
            "name": f"reproduction of {card['adapter_id']}"[:200],
        }
        job = dict(self.call("POST", "/api/training/jobs", json=request).json())
        say(f"Training as {job['id']}.")
        shown = ""
        while job["state"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(_POLL_S)
            job = self.job(job["id"])
            progress = job["progress"]
            line = f"  {job['state']}: step {progress['step']} of {progress['total_steps'] or '…'}"
            if line != shown:
                say(line)
            shown = line
        if job["state"] != "succeeded":
            raise CannotReproduce(f"The job {job['id']} is {job['state']}: {(job['error'] or {}).get('message')}")
        return job

    def adapter(self, job: dict[str, Any]) -> Adapter:
        """Return the adapter that a job made."""
        return read_adapter(io.BytesIO(self.call("GET", f"/api/adapters/{job['adapter_id']}/download").content))


def _detail(response: httpx.Response) -> str:
    """Return the reason of a refusal: a problem's detail, or the text of any other answer, such as a proxy's."""
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.text[:500]!r}"


def differences(first: RunCard, again: RunCard) -> list[str]:
    """Name the differences between two machines and their packages."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dict(first["packages"]), dict(again["packages"])),
        (dict(first["machine"]), dict(again["machine"])),
    ]
    return [
        f"{name} {one.get(name)} → {other.get(name)}"
        for one, other in pairs
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def compare(first: Adapter, again: Adapter, tolerance: float | None) -> bool:
    """Print how two trainings compare; tell whether they are the same.

    Args:
        tolerance: The largest relative difference of losses that counts as the same. With None the bits must be the
            same if machine and packages are.
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
    losses = dict(again.card["losses"])
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


def _close(one: Figure, other: Figure, relative: float) -> bool:
    """Compare two figures. Only losses have a tolerance; counts and missing figures have none."""
    if not isinstance(one, float) or not isinstance(other, float):
        return one == other
    return abs(one - other) <= relative * max(abs(one), abs(other))


def say(line: str) -> None:
    """Print a line at once."""
    print(_shown(line), flush=True)  # noqa: T201 - it is what the command is for


def _shown(line: str) -> str:
    """Write control characters as escapes, since a refusal may quote names of a card."""
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in line)


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
        dataset_id = server.dataset(card["dataset"], card["rows_sha256"], given.dataset)
        validation_id = None
        about, sum_ = card["validation_dataset"], card["validation_rows_sha256"]
        if about is not None and sum_ is not None:
            validation_id = server.dataset(about, sum_, given.validation_dataset)
        say(f"{card['algorithm']} on {card['base_model_id']}, dataset {dataset_id}.")
        again = server.adapter(server.train(card, dataset_id, validation_id))
    except CannotReproduce as error:
        print(_shown(f"reproduce: {error}"), file=sys.stderr)  # noqa: T201
        return 2
    return 0 if compare(first, again, given.tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
