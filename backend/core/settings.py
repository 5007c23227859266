"""Settings from the environment. `scripts/settings_table.py` makes the README's table of them."""

import os
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL

from core.api_key_file import KeyFileUnusable, read_key_file
from core.environment import Environment, nearest_name, variable
from core.setting_types import (
    ApiKey,
    DatabaseUrl,
    Executor,
    FullPath,
    FullPaths,
    HostName,
    HostNames,
    ModelNames,
    Origins,
    Port,
)
from core.singleton import singleton

_API_KEY: TypeAdapter[SecretStr] = TypeAdapter(ApiKey)
_SECRETS = frozenset({"PEFT_STUDIO_API_KEY", "PEFT_STUDIO_DATABASE_URL"})  # the second may hold a password


class SettingsRejected(Exception):
    """The server cannot start with these settings.

    Attributes:
        problems: One line for each, with the variable's name; no secret is in it.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def default_home() -> Path:
    """Return the data directory of the XDG base directory specification: `~/.local/share/peft-studio`.

    The specification has a relative XDG_DATA_HOME ignored.

    Raises:
        SettingsRejected: The user has no home folder.
    """
    shared = Path(os.environ.get("XDG_DATA_HOME", ""))
    if shared.is_absolute():
        return shared / "peft-studio"
    try:
        return Path.home() / ".local" / "share" / "peft-studio"
    except RuntimeError as error:
        raise SettingsRejected(("PEFT_STUDIO_HOME is not set, and this user has no home folder.",)) from error


class Settings(BaseSettings):
    """What an operator can set. Every field is the environment variable `PEFT_STUDIO_<FIELD>`.

    An empty variable is as one that is not set. Values given to the constructor come before the environment's.

    Raises:
        pydantic.ValidationError: A value is malformed, a variable is unknown, or the address needs an API key.
    """

    model_config = SettingsConfigDict(
        alias_generator=variable,
        populate_by_name=True,
        case_sensitive=True,
        env_ignore_empty=True,
        enable_decoding=False,  # lists are separated by commas or colons, not written as JSON
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    home: FullPath = Field(
        default_factory=default_home,
        description="data directory: database, datasets, adapters, checkpoints, logs; one server each",
        json_schema_extra={"default_in_words": "`~/.local/share/peft-studio`"},
    )
    host: HostName = Field(
        default="127.0.0.1", description="address to listen on; one that other machines reach requires a key"
    )
    port: Port = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: ApiKey | None = Field(
        default=None,
        description="if set, every route but `/health` wants `Authorization: Bearer <key>`; the pages ask for it once",
    )
    api_key_file: FullPath | None = Field(
        default=None,
        description="file with the key instead, which its owner alone may read; `make serve KEY=1` makes one",
    )
    database_url: DatabaseUrl | None = Field(
        default=None,
        description="`postgresql://…` (PostgreSQL 13 or newer) or `sqlite:////…`; one server a database",
        json_schema_extra={"default_in_words": "`studio.db` in the data directory"},
    )
    model_dirs: FullPaths = Field(
        default=(),
        description="folders of local models (`name/` or `owner/name/`), separated by `:`; one that cannot be read is "
        "said at start and looked at again with every request",
    )
    model_names: ModelNames = Field(
        default=(),
        description="the models that names in requests to `/v1` stand for: `name=model,name=model`, a name may hold "
        "`*` (`gpt-4o-mini*=HuggingFaceTB/SmolLM2-135M-Instruct`); the first that fits counts",
    )
    cache_dir: FullPath | None = Field(
        default=None,
        description="Hub metadata and configs, converted models, the embedded one",
        json_schema_extra={"default_in_words": "`cache/` in the data directory"},
    )
    allowed_hosts: HostNames = Field(default=(), description="host names beside loopback's, separated by commas")
    cors_origins: Origins = Field(default=(), description="origins of browser front ends, separated by commas")
    max_requests_per_client: int = Field(
        default=512,
        ge=1,
        description="most requests of one client address at once; more get 429 and `Retry-After`",
    )
    slow_request_s: float = Field(
        default=8.0, gt=0, description="a client that is silent for so many seconds within a request is cut off"
    )
    executor: Executor = Field(default="local", description="where engines run; `local` is the one executor there is")
    engine_nice: int = Field(
        default=10, ge=0, le=19, description="how far engines give way to the server and other programs (`nice`)"
    )
    idle_unload_s: float = Field(default=1800.0, gt=0, description="seconds after which an idle model is unloaded")
    make_room_after_s: float = Field(
        default=60.0,
        ge=0,
        description="a model idle for so many seconds is unloaded where another needs its memory",
    )
    answers_together: int = Field(
        default=16, ge=1, description="most answers that are written at once on one base; more wait for a place"
    )
    answers_waiting: int = Field(
        default=64, ge=0, description="most answers that wait on one base; more are refused with 503 and `Retry-After`"
    )
    warm_engine_bytes: int | None = Field(
        default=None,
        ge=0,
        description="host memory that engines may hold which are kept ready, with their imports done and nothing "
        "loaded; 0 keeps none",
        json_schema_extra={"default_in_words": "a tenth of the memory"},
    )
    max_upload_bytes: int = Field(default=5 * 2**30, gt=0, description="largest dataset file")
    max_checkpoint_bytes: int | None = Field(
        default=None, gt=0, description="most bytes of checkpoints a job keeps; the newest is always kept"
    )
    engine_silence_s: float = Field(
        default=60.0,
        gt=0,
        description="an engine that does not answer for so many seconds is ended, and its job goes on",
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="`console` for people, or `json` for one object a line"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="`debug`, `info`, `warning` or `error`"
    )

    @model_validator(mode="after")
    def _read_key(self) -> Self:
        if self.api_key_file is not None:
            if self.api_key is not None:
                raise ValueError("PEFT_STUDIO_API_KEY and PEFT_STUDIO_API_KEY_FILE are both set; set one of them")
            # The settings are frozen for everybody else.
            object.__setattr__(self, "api_key", _key_in(self.api_key_file))
        return self

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> Self:
        if not is_loopback(self.host) and self.api_key is None:
            raise ValueError(
                f"PEFT_STUDIO_HOST={self.host} can be reached from other machines: set PEFT_STUDIO_API_KEY or "
                "PEFT_STUDIO_API_KEY_FILE too"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the constructor's values and the environment; no file, and no folder of secrets."""
        return init_settings, Environment(settings_cls)

    @property
    def resolved_database_url(self) -> str:
        """The database: the one that is set, or a file of SQLite in `home`."""
        # Not put together by hand: a URL escapes what a folder's name may hold.
        return self.database_url or URL.create("sqlite", database=str(self.home / "studio.db")).render_as_string()

    @property
    def sqlite_path(self) -> Path | None:
        """The database's file, where it is the one in `home`."""
        return self.home / "studio.db" if self.database_url is None else None

    @property
    def resolved_cache_dir(self) -> Path:
        """The folder of prepared models: the one that is set, or one in `home`."""
        return self.cache_dir or self.home / "cache"


def _key_in(path: Path) -> SecretStr:
    try:
        return _API_KEY.validate_python(read_key_file(path))
    except KeyFileUnusable as error:
        raise ValueError(f"PEFT_STUDIO_API_KEY_FILE={path}: {error}") from error
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["ctx"]["error"]
        raise ValueError(f"PEFT_STUDIO_API_KEY_FILE={path}: {reason}") from None  # its own words would show the key


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def problems_of(error: ValidationError) -> Iterator[str]:
    """Yield a line for each thing that is wrong with the settings; no secret is in it."""
    for item in error.errors(include_url=False):
        reason = _reason(item)
        if not item["loc"]:  # a rule of several settings, which names them
            yield reason
        elif item["type"] == "extra_forbidden":
            yield _unknown(str(item["loc"][0]))
        else:
            name = str(item["loc"][0])
            value = "" if name in _SECRETS else f"={_printable(str(item['input']))}"
            yield f"{name}{value}: {reason}"


def _reason(item: ErrorDetails) -> str:
    context: dict[str, Any] = item.get("ctx", {})
    return str(context["error"]) if item["type"] == "value_error" else item["msg"]


def _unknown(name: str) -> str:
    known = [variable(field) for field in Settings.model_fields]
    nearest = nearest_name(name, known)
    advice = f"did you mean {nearest}?" if nearest is not None else f"there are {', '.join(known)}"
    return f"{_printable(name)} is not a setting; {advice}"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


@singleton
def get_settings() -> Settings:
    """Return the process's settings, read once.

    Raises:
        SettingsRejected: A value is malformed, a variable is unknown, or the address needs an API key.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsRejected(tuple(problems_of(error))) from None  # its own words would show less, and secrets
