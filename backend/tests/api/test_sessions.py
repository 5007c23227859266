"""Logins of the pages: only what this key signed, and only for a time."""

from hypothesis import given
from hypothesis import strategies as st

from api.sessions import LASTS_S, Sessions


def test_a_login_lasts_its_time_and_has_one_token() -> None:
    now = [1000.0]
    sessions = Sessions(b"key", 8000, lambda: now[0])
    cookie = sessions.begin()
    token = sessions.token_of(cookie)
    assert token is not None and token == sessions.token_of(cookie)
    assert token != sessions.token_of(sessions.begin())
    now[0] += LASTS_S - 1
    assert sessions.token_of(cookie) == token
    now[0] += 1
    assert sessions.token_of(cookie) is None


def test_what_another_key_signed_is_no_login() -> None:
    assert Sessions(b"other", 8000).token_of(Sessions(b"key", 8000).begin()) is None


_SESSIONS = Sessions(b"key", 8000, lambda: 1000.0)
_COOKIE = _SESSIONS.begin()


@given(st.integers(0, len(_COOKIE) - 1), st.characters())
def test_no_changed_cookie_is_a_login(place: int, letter: str) -> None:
    changed = _COOKIE[:place] + letter + _COOKIE[place + 1 :]
    assert (_SESSIONS.token_of(changed) is None) == (changed != _COOKIE)


@given(st.text())
def test_no_text_is_a_login(text: str) -> None:
    assert Sessions(b"key", 8000).token_of(text) is None
