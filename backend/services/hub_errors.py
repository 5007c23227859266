"""The one place where the Hub's errors become ours."""

import re
from typing import Any

from core.errors import HubUnavailable, ModelGated, ModelNotFound, StudioError

_PAUSE_S = 30.0  # where the Hub is in trouble but does not say for how long


def map_hub_error(error: Exception, model_id: str | None) -> StudioError:
    """Say what an error of huggingface_hub, httpx or the network means."""
    from huggingface_hub import errors as hub

    what = model_id or "the Hub"
    if isinstance(error, hub.LocalEntryNotFoundError):
        cause = error.__cause__ or error.__context__
        if isinstance(cause, Exception) and not isinstance(cause, hub.LocalEntryNotFoundError):
            return map_hub_error(cause, model_id)
        return HubUnavailable(f"{what} is not on this machine and the Hub cannot be reached.")
    if isinstance(error, hub.GatedRepoError):
        return ModelGated(f"{what} is gated: accept its licence on the Hub and set HF_TOKEN.")
    if isinstance(error, hub.RevisionNotFoundError):
        return ModelNotFound(f"{what} has no such revision.")
    if isinstance(error, hub.RepositoryNotFoundError | hub.EntryNotFoundError):
        return ModelNotFound(f"The Hub has no {what}, or it is private and the token does not open it.")
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return ModelGated(f"The Hub refuses {what} (status {status}): check HF_TOKEN.")
    if status == 404:
        return ModelNotFound(f"The Hub has no {what}.")
    if status == 429:
        wait_s = retry_after_s(dict(response.headers))
        return HubUnavailable(f"The Hub asks to wait {wait_s:g} s (rate limit).", retry_after_s=wait_s)
    if status is not None:
        return HubUnavailable(f"The Hub answers with status {status}.", retry_after_s=_PAUSE_S)
    return HubUnavailable(f"The Hub cannot be reached: {type(error).__name__}.", retry_after_s=_PAUSE_S)


def retry_after_s(headers: dict[str, str]) -> float:
    """Read how long the Hub asks to wait: `RateLimit: "api";r=0;t=55`, or `Retry-After` in seconds."""
    lower = {name.lower(): value for name, value in headers.items()}
    told = re.search(r"\bt=(\d+)", lower.get("ratelimit", "")) or re.match(r"(\d+)$", lower.get("retry-after", ""))
    return float(told.group(1)) if told else _PAUSE_S
