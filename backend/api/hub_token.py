"""X-HF-Token: the Hub token of one request, in place of HF_TOKEN."""

from typing import Annotated

from fastapi import Depends, Header

from services.hub.http import request_token

HUB_TOKEN = Header(
    alias="X-HF-Token",
    min_length=1,
    max_length=512,
    pattern=r"^[\x21-\x7e]+$",
    description="A Hub token for this request and the download that it starts, in place of HF_TOKEN; in memory alone.",
)


async def use_hub_token(token: Annotated[str | None, HUB_TOKEN] = None) -> None:
    """Use the header's token for this request's calls to the Hub.

    The context belongs to the request's task, and ends with it.
    """
    if token is not None:
        request_token.set(token)


def came_with_a_token() -> bool:
    """Tell whether the request that is being answered brought a token of its own."""
    return request_token.get() is not None


ASKS_THE_HUB = [Depends(use_hub_token)]  # of every route whose answer may depend on the token
