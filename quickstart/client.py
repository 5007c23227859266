"""The few calls of the API that a fine-tune takes."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_RECONNECTS = 5


class Refused(Exception):
    """The server answered with a problem document."""


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    id: str | None
    kind: str
    data: dict[str, Any]


class Client:
    """Talks to the server; sends PEFT_STUDIO_API_KEY if it is set."""

    def __init__(self, url: str) -> None:
        key = os.environ.get("PEFT_STUDIO_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(120, connect=10))

    def get(self, path: str) -> Any:
        """GET a JSON document."""
        return self._checked(self._http.get(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST a JSON document."""
        return self._checked(self._http.post(path, json=body))

    def upload(self, path: Path, name: str) -> Any:
        """Upload a dataset."""
        with path.open("rb") as file:
            return self._checked(self._http.post("/api/datasets", files={"file": file}, data={"name": name}))

    def ask(self, loaded_model_id: str, question: str, adapter_id: str | None) -> str:
        """Ask a loaded model, with an adapter or the bare base, always for the likeliest answer."""
        body = {
            "messages": [{"role": "user", "content": question}],
            "adapter_id": adapter_id,
            "max_new_tokens": 60,
            "temperature": 0,
        }
        answer: str = self.post(f"/api/peft/loaded-models/{loaded_model_id}/generate", body)["text"]
        return answer.strip()

    def events(self, job_id: str) -> Iterator[Event]:
        """Yield a job's events until it ends; a broken stream is taken up where it broke."""
        last, failures = "0", 0
        while True:
            try:
                headers = {"Last-Event-ID": last}
                with self._http.stream("GET", f"/api/training/jobs/{job_id}/events", headers=headers) as response:
                    if response.status_code != 200:
                        response.read()
                        self._checked(response)
                    for event in _parse(response.iter_lines()):
                        last, failures = event.id or last, 0
                        yield event
                return
            except httpx.TransportError:
                failures += 1
                if failures > _RECONNECTS:
                    raise
                time.sleep(0.5 * failures)

    @staticmethod
    def _checked(response: httpx.Response) -> Any:
        if response.is_success:
            return response.json()
        try:
            problem = response.json()
            raise Refused(f"{problem['title']} ({problem['status']}): {problem['detail']}")
        except (ValueError, KeyError) as error:
            raise Refused(f"{response.status_code}: {response.text[:300]}") from error


def _parse(lines: Iterator[str]) -> Iterator[Event]:
    """Read server-sent events (WHATWG HTML, section 9.2): fields until an empty line."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            yield Event(fields.get("id"), fields.get("event", "message"), json.loads(fields["data"]))
            fields = {}
