"""Settings from the environment; the table in README.md is generated from the field descriptions' facts."""

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from core.singleton import singleton

_PREFIX = "PEFT_STUDIO_"
_LIST_FIELDS = frozenset({"model_dirs", "allowed_hosts", "cors_origins"})


def default_home() -> Path:
    """Return the data directory of the XDG base directory specification: `~/.local/share/peft-studio`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "peft-studio"


class Settings(BaseModel):
    """What an operator can set. Every field is the environment variable `PEFT_STUDIO_<FIELD>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path = Field(default_factory=default_home, description="Data directory.")
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: SecretStr | None = Field(default=None, description="If set, required as a bearer token.")
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; SQLite in `home` if unset.")
    model_dirs: tuple[Path, ...] = Field(default=(), description="Folders that hold local models.")
    cache_dir: Path | None = Field(default=None, description="Metadata and prepared models; `home/cache`.")
    allowed_hosts: tuple[str, ...] = Field(default=(), description="Host names accepted beside loopback's.")
    cors_origins: tuple[str, ...] = Field(default=(), description="Origins of browser front ends.")
    executor: Literal["local"] = Field(default="local", description="Where engines run.")
    idle_unload_s: float = Field(default=1800.0, gt=0, description="An idle model is unloaded after this.")
    make_room_after_s: float = Field(
        default=60.0, ge=0, description="A model idle for this long is unloaded where another needs its memory."
    )
    max_upload_bytes: int = Field(default=5 * 2**30, gt=0, description="Largest dataset file accepted.")
    max_checkpoint_bytes: int | None = Field(
        default=None, gt=0, description="Most bytes of checkpoints a job keeps; the newest is always kept."
    )
    engine_silence_s: float = Field(default=60.0, gt=0, description="An engine silent for this long is ended.")
    log_format: Literal["console", "json"] = Field(default="console", description="Log lines' format.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> Self:
        if not is_loopback(self.host) and self.api_key is None:
            raise ValueError(
                f"PEFT_STUDIO_HOST={self.host} can be reached from other machines: set PEFT_STUDIO_API_KEY too"
            )
        return self

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'studio.db'}"

    @property
    def sqlite_path(self) -> Path | None:
        """The database's file, where it is the one in `home`."""
        return self.home / "studio.db" if self.database_url is None else None

    @property
    def resolved_cache_dir(self) -> Path:
        return self.cache_dir or self.home / "cache"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings.

        Args:
            environ: The variables to read; the process's own by default. Lists are separated by the
                platform's path separator (`model_dirs`) or by commas.

        Raises:
            pydantic.ValidationError: A value is malformed, or the address needs an API key.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, object] = {}
        for name in cls.model_fields:
            raw = environ.get(_PREFIX + name.upper(), "")
            if raw == "":
                continue
            separator = os.pathsep if name == "model_dirs" else ","
            values[name] = (
                tuple(part.strip() for part in raw.split(separator) if part.strip()) if name in _LIST_FIELDS else raw
            )
        return cls.model_validate(values)


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@singleton
def get_settings() -> Settings:
    """Return the process's settings, read once."""
    return Settings.from_env()
