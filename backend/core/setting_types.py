"""Types for settings with rules of their own. Each error message says what to write instead."""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, SecretStr
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
# RFC 6454, section 6.2: scheme, host and port, and nothing after them.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@*A-Z]+|null")
_HEADER_TEXT = re.compile(r"[!-~]([ -~]*[!-~])?")


def _full_path(path: Path) -> Path:
    """Expand `~`. Refuse a relative path, because it would depend on the folder that the server is started in."""
    try:
        path = path.expanduser()
    except RuntimeError as error:  # no such user, or a user without a home
        raise ValueError("this machine knows no such home folder; write the full path") from error
    if not path.is_absolute():
        raise ValueError("not a full path; it has to begin with / or ~ (variables within it are not replaced)")
    return path


def _items(separator: str) -> BeforeValidator:
    """Split a variable's text into a list. A list that code passes stays as it is."""

    def split(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(separator) if part.strip())

    return BeforeValidator(split)


def _host_name(value: str) -> str:
    name = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if _HOST_NAME.fullmatch(name) is None and not _is_address(name):
        raise ValueError("not a host name or address; write it without scheme and port")
    return name


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _origin(value: str) -> str:
    if value == "*":
        raise ValueError("every page could drive the server; name each origin, such as http://localhost:3000")
    if _ORIGIN.fullmatch(value) is None:
        raise ValueError(
            "not an origin as browsers send it, such as http://localhost:3000: scheme, host and port, in lower case, "
            "and no slash at the end"
        )
    return value


def _api_key(value: SecretStr) -> SecretStr:
    if _HEADER_TEXT.fullmatch(value.get_secret_value()) is None:
        raise ValueError("no client can send it: ASCII characters only, and no space or line break at either end")
    return value


def _database_url(value: str) -> str:
    try:
        url = make_url(value)
    except ArgumentError as error:
        raise ValueError("not a database URL, such as postgresql://user:password@host/name") from error
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return value
    if backend != "sqlite":
        raise ValueError(f"{backend} is no database that the server can use: PostgreSQL and SQLite are")
    if not url.database or url.database == ":memory:":
        raise ValueError("SQLite needs a file, such as sqlite:////var/lib/peft-studio/studio.db")
    file = _full_path(Path(url.database))
    return url.set(database=str(file)).render_as_string(hide_password=False)


def _model_names(value: Any) -> Any:
    """Split `name=base,name=base`. Pairs that code passes stay as they are."""
    if not isinstance(value, str):
        return value
    pairs = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, equals, base = (text.strip() for text in part.partition("="))
        if not (name and equals and base):
            raise ValueError(f"{part!r:.80} is no name=base, such as gpt-4o-mini*=HuggingFaceTB/SmolLM2-135M-Instruct")
        pairs.append((name, base))
    return tuple(pairs)


def _port(value: Any) -> Any:
    # Kubernetes sets such variables for every Service. One named peft-studio sets this one.
    if isinstance(value, str) and value.startswith(("tcp://", "udp://")):
        raise ValueError(
            "Kubernetes sets this for a Service named peft-studio; set it in the pod, or enableServiceLinks: false"
        )
    return value


def _executor(value: Any) -> Any:
    if value != "local":
        raise ValueError("engines run on the server's machine only; 'local' is the one executor there is")
    return value


FullPath = Annotated[Path, AfterValidator(_full_path)]
FullPaths = Annotated[tuple[FullPath, ...], _items(os.pathsep)]
HostName = Annotated[str, AfterValidator(_host_name)]
HostNames = Annotated[tuple[HostName, ...], _items(",")]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], _items(",")]
ApiKey = Annotated[SecretStr, AfterValidator(_api_key)]
DatabaseUrl = Annotated[str, AfterValidator(_database_url)]
Port = Annotated[int, BeforeValidator(_port)]
Executor = Annotated[Literal["local"], BeforeValidator(_executor)]
ModelNames = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_model_names)]
