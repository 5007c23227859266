"""A chat template is a program of a stranger's: what it may not do is a 422, and the engine and the server live."""

from pathlib import Path

import pytest

from tests.support.server import start_server
from tests.support.tiny_model import copy_tiny_model

pytestmark = pytest.mark.engine
_TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "memory": ("{{ 'a' * 10**11 }}", "too much memory"),
    "number": ("{% set x = 9 ** (9 ** 9) %}", "more than 10000 bits"),
    "loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "come to an end"),
}


def test_a_hostile_template_is_a_422_and_the_engine_lives(tmp_path: Path) -> None:
    for name, (template, _) in TEMPLATES.items():
        copy_tiny_model(tmp_path / "models" / name)
        (tmp_path / "models" / name / "chat_template.jinja").write_text(template + _TURNS)
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_new_tokens": 1}
    with start_server(tmp_path / "home", tmp_path / "models") as studio:
        for name, (_, words) in TEMPLATES.items():
            loaded = studio.load(name)
            engine = studio.engine().pid
            response = studio.http.post(f"/api/peft/loaded-models/{loaded['id']}/generate", json=ask)
            assert (response.status_code, response.json()["type"]) == (422, "/problems/generation-rejected")
            assert words in response.json()["detail"], response.text
            assert studio.engine().pid == engine
            studio.http.delete(f"/api/peft/loaded-models/{loaded['id']}")
