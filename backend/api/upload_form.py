"""Writes a multipart upload to its place while it arrives. No copy is kept in memory or in the temporary folder."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from core.errors import Rejected

_MAX_FIELDS = 20
M = TypeVar("M", bound=BaseModel)


class Receiver(Protocol):
    """Takes a file while it arrives."""

    def write(self, data: bytes) -> int:
        """Append."""

    def close(self) -> None:
        """Keep the file."""

    def abandon(self) -> None:
        """Close a file that will be discarded."""


class UploadMalformed(Rejected):
    """The multipart body cannot be read, or it is not one file with its settings."""

    slug, title = "malformed-upload", "Malformed upload"


class _Sink:
    """A draft's file, as Starlette's parser wants a file."""

    def __init__(self, file: Receiver) -> None:
        self.file = file
        self.whole = False

    def write(self, data: bytes) -> int:
        return self.file.write(data)

    def seek(self, _position: int) -> None:
        """The parser goes back to the start when the part has ended."""
        self.whole = True

    def close(self) -> None:
        """Do nothing. The draft keeps or discards the file."""


class _Parser(MultiPartParser):
    """Starlette's parser. It writes the file to its place instead of to a spooled file."""

    def __init__(self, request: Request, receive: Callable[[str], Receiver], field: str) -> None:
        super().__init__(request.headers, request.stream(), max_files=1, max_fields=_MAX_FIELDS)
        self._receive, self._field = receive, field
        self.sink: _Sink | None = None

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            if self._current_part.field_name != self._field:
                found = self._current_part.field_name
                raise MultiPartException(f"The file is in the field {found!r:.60}, not {self._field!r}.")
            # Names are shown on terminals, so control characters are replaced.
            shown = "".join(letter if letter.isprintable() else "_" for letter in upload.filename or "upload")
            self.sink = _Sink(self._receive(shown[-200:]))
            upload.file = cast(Any, self.sink)


async def read_upload(request: Request, receive: Callable[[str], Receiver], field: str = "file") -> dict[str, Any]:
    """Read a form with one file.

    Args:
        receive: Takes the file's name. It opens the place for its content.
        field: The one that the file is in.

    Returns:
        The other fields.

    Raises:
        UploadMalformed: The body is no such form, or it is incomplete.
        starlette.requests.ClientDisconnect: The client went away.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UploadMalformed("Send multipart/form-data.")
    parser = _Parser(request, receive, field)
    try:
        form = await parser.parse()
        sink = parser.sink
        if sink is None:
            location = ("body", field)
            raise RequestValidationError([{"loc": location, "msg": "Field required", "type": "missing", "input": None}])
        if not sink.whole:
            raise UploadMalformed("The upload ends before its end mark.")
    except MultiPartException as error:
        _abandon(parser)
        raise UploadMalformed(str(error.message)) from error
    except BaseException:
        _abandon(parser)
        raise
    fields = [(name, value) for name, value in form.multi_items() if not isinstance(value, UploadFile)]
    if len(dict(fields)) != len(fields):
        _abandon(parser)
        raise UploadMalformed("A field is there twice.")
    sink.file.close()
    return dict(fields)


def validated(model: type[M], values: Any) -> M:
    """Validate a body that FastAPI did not read. The errors are those that FastAPI would raise.

    Args:
        values: The fields, or the JSON itself.

    Raises:
        RequestValidationError: The values do not fit the model.
    """
    try:
        return model.model_validate_json(values) if isinstance(values, bytes) else model.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False, include_context=False)
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in errors]) from error


def _abandon(parser: _Parser) -> None:
    if parser.sink is not None:
        parser.sink.file.abandon()
