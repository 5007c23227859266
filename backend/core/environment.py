"""The environment's variables: those that begin with PEFT_STUDIO_, what an unknown one meant, and those kept secret."""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource

PREFIX = "PEFT_STUDIO_"
# They begin as settings do and are none: the server gives the first to its own processes, the tests read the others.
OWN_VARIABLES = frozenset(
    {
        "PEFT_STUDIO_PARENT_PID",
        "PEFT_STUDIO_RESULT_FD",
        "PEFT_STUDIO_ENGINE_BACKEND",
        "PEFT_STUDIO_ENGINE_COMMAND_FD",
        "PEFT_STUDIO_ENGINE_EVENT_FD",
        "PEFT_STUDIO_WORKER_SOCKET",
        "PEFT_STUDIO_TEST_CACHE",
        "PEFT_STUDIO_SOAK_KILLS",
        "PEFT_STUDIO_TEST_REQUESTS",
    }
)
# What Kubernetes tells every pod about a Service named peft-studio, beside PEFT_STUDIO_PORT.
# Source: "Service", "Discovering services", kubernetes.io; the form is that of Docker's links.
_SERVICE_LINK = re.compile(
    r"PEFT_STUDIO_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
# The prefix as people mistype it: in lower case, with another number of underscores, with hyphens.
_LIKE_PREFIX = re.compile(r"peft[-_]*studio[-_]", re.IGNORECASE)
# The server's own secrets, and other programs' by how they are named: no process that loads models needs any.
_SECRETS = frozenset({"HUGGING_FACE_HUB_TOKEN", "PEFT_STUDIO_DATABASE_URL", "PGPASSWORD"})
_SECRET_ENDING = re.compile(r"_(TOKEN|API_KEY|ACCESS_KEY|SECRET|SECRET_KEY|PASSWORD|CREDENTIALS)$")
_SIMILAR = 0.6  # difflib's own bound for a good match


def variable(field: str) -> str:
    """Return the variable of a setting."""
    return PREFIX + field.upper()


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process that loads models: it sees no Hub, no database and no client."""
    return {
        name: value
        for name, value in variables.items()
        if name.upper() not in _SECRETS and not _SECRET_ENDING.search(name.upper())
    }


def unknown_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names that look like a setting's and are not one, in order.

    Args:
        names: Variables' names, other programs' among them.
        known: The settings' variables.
    """
    expected = OWN_VARIABLES | frozenset(known)
    return sorted(
        name
        for name in names
        if _LIKE_PREFIX.match(name) and name not in expected and not _SERVICE_LINK.fullmatch(name)
    )


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the setting's variable that is most like a name, or None if none is like it."""
    by_bare_name = {_bare(candidate): candidate for candidate in known}
    matches = get_close_matches(_bare(name), by_bare_name, n=1, cutoff=_SIMILAR)
    return by_bare_name[matches[0]] if matches else None


def _bare(name: str) -> str:
    """Return a name without its prefix, case and separators."""
    return re.sub("[-_]", "", _LIKE_PREFIX.sub("", name)).upper()


class Environment(EnvSettingsSource):
    """The variables of the settings, and the names of those that are unknown, which the settings then refuse.

    An unknown variable's value is left behind: it may be a secret.
    """

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self._known = [variable(field) for field in settings_cls.model_fields]

    def __call__(self) -> dict[str, Any]:
        """Return the settings' values, and each unknown name with an empty one."""
        return super().__call__() | dict.fromkeys(unknown_names(os.environ, self._known), "")
