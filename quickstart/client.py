"""The few calls of the API that a fine-tune needs."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

# An interrupted job goes on by itself; a paused one waits for a person.
ENDED = frozenset({"succeeded", "failed", "cancelled", "paused"})
_RECONNECTS = 5  # in a row without an event between them: 7.5 s in all
_CANCEL_LIMIT_S = 10.0  # a running job ends within a forward pass


class Refused(Exception):
    """The server answered with a problem document."""


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    id: str | None
    kind: str
    data: dict[str, Any]


class Client:
    """Sends requests to the server, with the key in PEFT_STUDIO_API_KEY or PEFT_STUDIO_API_KEY_FILE if one is set."""

    def __init__(self, url: str) -> None:
        key, file = os.environ.get("PEFT_STUDIO_API_KEY"), os.environ.get("PEFT_STUDIO_API_KEY_FILE")
        if not key and file:
            key = Path(file).expanduser().read_text(encoding="ascii").rstrip("\r\n")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(120, connect=10)
        # trust_env=False: a proxy for the internet must not be used for this machine.
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)

    @property
    def url(self) -> str:
        """The server's address, without a slash at its end."""
        return str(self._http.base_url).rstrip("/")

    def get(self, path: str) -> Any:
        """GET a JSON document."""
        return _checked(self._http.get(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST a JSON document."""
        return _checked(self._http.post(path, json=body))

    def upload(self, path: Path, name: str) -> Any:
        """Upload a dataset."""
        with path.open("rb") as file:
            form = {"name": name, "format": "auto"}
            return _checked(self._http.post("/api/datasets", files={"file": file}, data=form))

    def ask(self, loaded_model_id: str, question: str, adapter_id: str | None) -> str:
        """Return the likeliest answer of a loaded model, with an adapter or the bare base."""
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "max_new_tokens": 60,
            "temperature": 0,
        }
        if adapter_id is not None:
            body["adapter_id"] = adapter_id
        answer: str = self.post(f"/api/peft/loaded-models/{loaded_model_id}/generate", body)["text"]
        return answer.strip()

    def events(self, job_id: str) -> Iterator[Event]:
        """Yield a job's events until it ends or is paused. A stream that breaks is continued where it was.

        Raises:
            Refused: The server knows no such job.
            httpx.TransportError: The server cannot be reached any more.
        """
        last, state, failures = "0", "", 0
        while True:
            try:
                for event in self._stream(job_id, last):
                    last, failures = event.id or last, 0
                    if event.kind == "state":
                        state = event.data["state"]
                    yield event
                    if state in ENDED:
                        return
                error = httpx.TransportError("the event stream ends before the job does")
            except httpx.TransportError as broken:
                error = broken
            failures += 1
            if failures > _RECONNECTS:
                raise error
            time.sleep(0.5 * failures)

    def _stream(self, job_id: str, last_event_id: str) -> Iterator[Event]:
        headers = {"Last-Event-ID": last_event_id, "Accept": "text/event-stream"}
        with self._http.stream("GET", f"/api/training/jobs/{job_id}/events", headers=headers) as response:
            if not response.is_success:
                response.read()
                _checked(response)
            yield from _parse(response.iter_lines())

    def cancel(self, job_id: str) -> str:
        """Cancel a job, wait for its end, and return its state. Errors meanwhile are not raised."""
        path = f"/api/training/jobs/{job_id}"
        deadline = time.monotonic() + _CANCEL_LIMIT_S
        state = "unknown"
        try:
            self._http.post(f"{path}/cancel", timeout=_CANCEL_LIMIT_S)
            while state not in ENDED and time.monotonic() < deadline:
                state = _checked(self._http.get(path, timeout=_CANCEL_LIMIT_S))["state"]
                time.sleep(0.1)
        except (httpx.HTTPError, Refused):
            pass
        return state


def _checked(response: httpx.Response) -> Any:
    if response.is_success:
        return response.json()
    try:
        problem = response.json()
        words = f"{problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        words = f"{response.status_code} from {response.url.path}: {response.text[:300]}"
    raise Refused(words)


def _parse(lines: Iterator[str]) -> Iterator[Event]:
    """Read server-sent events (WHATWG HTML, section 9.2): fields until an empty line."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and "data" in fields else value
        else:
            if "data" in fields:
                yield Event(fields.get("id"), fields.get("event", "message"), json.loads(fields["data"]))
            fields = {}
