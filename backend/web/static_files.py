"""/static: the scripts and styles of the pages."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header
from fastapi.responses import Response

from web.assets import Assets, get_assets

router = APIRouter(include_in_schema=False)
_FOR_EVER = "public, max-age=31536000, immutable"


@router.get("/static/{version}/{name:path}")
def static_file(
    version: str,
    name: str,
    assets: Annotated[Assets, Depends(get_assets)],
    accept_encoding: Annotated[str, Header()] = "",
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Send a file, under gzip where the browser takes that. Under the present version it is kept for ever."""
    asset = assets.get(name)
    if asset is None:
        return Response("There is no such file.", 404, media_type="text/plain")
    headers = {
        "Cache-Control": _FOR_EVER if version == assets.version else "no-cache",
        "ETag": asset.etag,
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    if if_none_match is not None and asset.etag in (tag.strip().removeprefix("W/") for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    if "gzip" in accept_encoding:
        return Response(asset.compressed, headers={**headers, "Content-Encoding": "gzip"}, media_type=asset.media_type)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
