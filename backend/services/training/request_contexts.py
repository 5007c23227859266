"""The Hub tokens of requests, for the jobs that the requests created."""

import contextvars

from services.hub.http import request_token


class RequestContexts:
    """Keeps the contexts of requests that brought a Hub token: in memory alone, until their job ends."""

    def __init__(self) -> None:
        self._kept: dict[str, contextvars.Context] = {}

    def keep(self, job_id: str) -> None:
        """Keep the context of the request that is being answered, if it brought a token."""
        if request_token.get() is not None:
            self._kept[job_id] = contextvars.copy_context()

    def of(self, job_id: str) -> contextvars.Context:
        """Return a copy of the context that a job is to run in; an empty one if its request brought no token."""
        return self._kept.get(job_id, contextvars.Context()).copy()

    def drop(self, job_id: str) -> None:
        """Forget the context of a job that has ended."""
        self._kept.pop(job_id, None)
