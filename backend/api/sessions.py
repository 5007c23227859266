"""Logins of the pages, where an API key is set: a signed cookie, and a token for requests that change something.

Nothing is stored. A login ends after a time, when the key changes, and in the browser when a person logs out.
"""

import hmac
import secrets
import time
from collections.abc import Callable

LASTS_S = 30 * 86400


class Sessions:
    """Makes and checks logins.

    Args:
        key: The API key; what is made of another key is not valid.
        port: Of the server. Browsers keep one jar of cookies for all ports of a host, so it is in the cookie's name.
        now: Returns Unix seconds.
    """

    def __init__(self, key: bytes, port: int, now: Callable[[], float] = time.time) -> None:
        self._key, self._now = key, now
        self.cookie_name = f"peft_studio_{port}"

    def is_key(self, sent: str) -> bool:
        """Tell whether this is the API key."""
        return hmac.compare_digest(sent.encode(), self._key)

    def begin(self) -> str:
        """Return the value of a new login's cookie."""
        said = f"{int(self._now()) + LASTS_S}.{secrets.token_urlsafe(16)}"
        return f"{said}.{self._signed('session', said)}"

    def token_of(self, cookie: str) -> str | None:
        """Return the token that belongs to a login's cookie; None where the cookie is not, or no longer, valid."""
        said, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signed("session", said).encode()):
            return None
        ends = said.partition(".")[0]
        if not ends.isascii() or not ends.isdigit() or int(ends) <= self._now():
            return None
        return self._signed("csrf", said)

    def _signed(self, purpose: str, said: str) -> str:
        return hmac.new(self._key, f"peft-studio {purpose} {said}".encode(), "sha256").hexdigest()
