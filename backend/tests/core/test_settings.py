"""What the settings take from the environment and what they refuse, each refusal with the variable's name."""

import os
import re
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from core import api_key_file
from core.environment import OWN_VARIABLES, variable
from core.settings import Settings, SettingsRejected, get_settings
from core.start_checks import unreadable_model_dirs
from tests.support.server import BACKEND

HOME = Path("/home/someone")
VARIABLES = [variable(field) for field in Settings.model_fields]
LETTERS = st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
# Names of folders and files that no separator, query or escape of a URL is in.
NAMES = st.from_regex(r"[A-Za-z0-9_é][A-Za-z0-9_é. -]{0,8}[A-Za-z0-9_é]", fullmatch=True)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


def settings_of(**environment: str) -> Settings:
    """Read the settings from these variables alone."""
    with mock.patch.dict(os.environ, {"HOME": str(HOME), **environment}, clear=True):
        get_settings.clear()
        try:
            return get_settings()
        finally:
            get_settings.clear()


def refusal_of(**environment: str) -> tuple[str, ...]:
    """Return what is said of these variables."""
    with pytest.raises(SettingsRejected) as caught:
        settings_of(**environment)
    return caught.value.problems


# Names


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str]:
    """Return a setting's variable and the same with one typing error after the prefix."""
    right = draw(st.sampled_from(VARIABLES))
    bare = right.removeprefix("PEFT_STUDIO_")
    place = draw(st.integers(0, len(bare) - 1))
    head, letter, tail = bare[:place], bare[place], bare[place + 1 :]
    wrong = draw(
        st.one_of(
            LETTERS.map(lambda other: f"{head}{other}{tail}"),
            LETTERS.map(lambda other: f"{head}{letter}{other}{tail}"),
            st.just(f"{head}{tail}"),
            st.just(f"{head}{tail[:1]}{letter}{tail[1:]}"),
        )
    )
    assume(f"PEFT_STUDIO_{wrong}" not in VARIABLES)
    return right, f"PEFT_STUDIO_{wrong}"


@given(names=misspelt(), value=st.sampled_from(["", "x", "canary-secret"]))
def test_one_typing_error_is_refused_by_name_with_the_name_that_was_meant(names: tuple[str, str], value: str) -> None:
    right, wrong = names
    (problem,) = refusal_of(**{wrong: value})
    assert problem.startswith(f"{wrong} is not a setting; ")
    assert "canary-secret" not in problem
    if len(right.removeprefix("PEFT_STUDIO_")) > 6:  # of HOST and PORT, HOME and HOST, either may have been meant
        assert problem.endswith(f"did you mean {right}?")
    else:
        assert any(problem.endswith(f"did you mean {name}?") for name in VARIABLES) or all(
            name in problem for name in VARIABLES
        )


@pytest.mark.parametrize("field", Settings.model_fields)
@pytest.mark.parametrize("form", ["peft_studio_{}", "PEFTSTUDIO_{}", "PEFT__STUDIO_{}", "Peft_Studio_{}"])
def test_the_prefix_is_looked_for_as_people_mistype_it(form: str, field: str) -> None:
    wrong = form.format(field)
    assert refusal_of(**{wrong: "1"}) == (f"{wrong} is not a setting; did you mean {variable(field)}?",)


def test_where_no_name_is_like_it_all_are_said() -> None:
    (problem,) = refusal_of(PEFT_STUDIO_QQQQ="1")
    assert all(name in problem for name in VARIABLES)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    problems = refusal_of(PEFT_STUDIO_HOEM="/x", PEFT_STUDIO_PORT="70000", PEFT_STUDIO_LOG_LEVEL="loud")
    assert len(problems) == 3
    for name, problem in zip(("PORT=70000:", "LOG_LEVEL=loud:", "HOEM is not"), problems, strict=True):
        assert problem.startswith(f"PEFT_STUDIO_{name}")


@pytest.mark.parametrize(
    "name",
    [
        *sorted(OWN_VARIABLES),
        "PEFT_STUDIO",
        "MY_PEFT_STUDIO_HOME",
        "PEFT_HOME",
        "PEFT_STUDIO_SERVICE_HOST",
        "PEFT_STUDIO_SERVICE_PORT_HTTP",
        "PEFT_STUDIO_PORT_8000_TCP",
        "PEFT_STUDIO_PORT_8000_TCP_ADDR",
    ],
)
def test_what_others_set_is_no_misspelt_setting(name: str) -> None:
    assert settings_of(**{name: "1"}) == settings_of()


def test_every_variable_that_the_project_names_is_a_setting_or_its_own() -> None:
    root = BACKEND.parent
    files = [root / "README.md", root / "Makefile", root / "CHANGELOG.md"]
    for folder, kind in (("backend", "*.py"), ("bench", "*.py"), ("quickstart", "*.py"), ("docs", "*.md")):
        files += [file for file in (root / folder).rglob(kind) if not file.name.startswith("test_settings")]
    found: set[str] = set()
    for file in files:
        found |= set(re.findall(r"PEFT_STUDIO_[A-Z][A-Z_]*[A-Z]", file.read_text(encoding="utf-8")))
    assert found <= set(VARIABLES) | OWN_VARIABLES, found - set(VARIABLES) - OWN_VARIABLES
    assert found >= OWN_VARIABLES, "a name is held that nothing reads any more"


# Empty variables, lists and what code gives


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_is_as_one_that_is_not_set(name: str) -> None:
    assert settings_of(**{name: ""}) == settings_of()


@given(paths=st.lists(PATHS, max_size=4))
def test_a_list_is_read_as_it_was_written(paths: list[str]) -> None:
    wanted = tuple(Path("/", path) for path in paths)
    written = os.pathsep.join(f" {path} {os.pathsep}" for path in wanted)
    assert settings_of(PEFT_STUDIO_MODEL_DIRS=written).model_dirs == wanted


def test_what_code_gives_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_STUDIO_HOME", "/from/the/environment")
    assert Settings(home=Path("/given"), model_dirs=(Path("/a:b"),)).home == Path("/given")
    assert Settings(model_dirs=(Path("/a:b"),)).model_dirs == (Path("/a:b"),)
    assert Settings().home == Path("/from/the/environment")


# Paths


@given(path=PATHS)
def test_a_tilde_is_expanded_in_every_path(path: str) -> None:
    settings = settings_of(
        PEFT_STUDIO_HOME=f"~/{path}",
        PEFT_STUDIO_CACHE_DIR=f"~/{path}/c",
        PEFT_STUDIO_MODEL_DIRS=os.pathsep.join((f"~/{path}", "/m", "~")),
        PEFT_STUDIO_DATABASE_URL=f"sqlite:///~/{path}/d.db",
    )
    assert settings.home == HOME / path
    assert settings.cache_dir == settings.resolved_cache_dir == HOME / path / "c"
    assert settings.model_dirs == (HOME / path, Path("/m"), HOME)
    assert make_url(settings.resolved_database_url).database == f"{HOME / path}/d.db"


@given(name=st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1))
def test_the_database_lies_in_the_data_directory_whatever_that_is_called(name: str) -> None:
    settings = settings_of(PEFT_STUDIO_HOME=f"/{name}")
    assert settings.sqlite_path == Path(f"/{name}", "studio.db")
    assert make_url(settings.resolved_database_url).database == str(settings.sqlite_path)


@given(path=st.one_of(PATHS, st.sampled_from([".", "..", "$HOME/x", "${HOME}", "'~/x'", '"/x"', "file:///x"])))
@pytest.mark.parametrize("name", ["HOME", "CACHE_DIR", "MODEL_DIRS"])
def test_a_path_that_depends_on_where_the_server_is_started_is_refused(name: str, path: str) -> None:
    if name == "MODEL_DIRS":
        assume(":" not in path)
    (problem,) = refusal_of(**{f"PEFT_STUDIO_{name}": path})
    assert problem.startswith(f"PEFT_STUDIO_{name}=") and "not a full path" in problem


def test_a_user_that_there_is_not_has_no_home() -> None:
    (problem,) = refusal_of(PEFT_STUDIO_MODEL_DIRS="/a:~nobody-of-this-name/models")
    assert problem.startswith("PEFT_STUDIO_MODEL_DIRS=~nobody-of-this-name/models: ")


def test_a_relative_data_folder_of_the_desktop_is_ignored() -> None:
    assert settings_of(XDG_DATA_HOME="data").home == HOME / ".local/share/peft-studio"
    assert settings_of(XDG_DATA_HOME="/data").home == Path("/data/peft-studio")


def test_a_user_without_a_home_has_to_name_a_data_directory() -> None:
    with mock.patch.object(Path, "home", side_effect=RuntimeError):
        (problem,) = refusal_of()
        assert "PEFT_STUDIO_HOME" in problem
        assert settings_of(PEFT_STUDIO_HOME="/data").home == Path("/data")


def test_model_folders_that_cannot_be_read_are_told_from_the_others(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "linked").symlink_to(tmp_path / "models")
    names = ("models", "missing", "file", "link", "loop", "linked")
    settings = Settings(home=tmp_path, model_dirs=tuple(tmp_path / name for name in names))
    flaws = {path.name: reason for path, reason in unreadable_model_dirs(settings)}
    assert list(flaws) == ["missing", "file", "link", "loop"]
    assert flaws["missing"] == flaws["link"] == "it does not exist"
    assert "Not a directory" in flaws["file"] and "symbolic links" in flaws["loop"]


# Values


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "70000", "65535"),
        ("PORT", "-1", "greater than or equal to 0"),
        ("PORT", "http", "valid integer"),
        ("PORT", "tcp://10.0.0.1:8000", "Kubernetes"),
        ("HOST", "http://127.0.0.1", "without scheme and port"),
        ("HOST", "127.0.0.1:8000", "without scheme and port"),
        ("HOST", " ", "without scheme and port"),
        ("HOST", "0.0.0.0", "PEFT_STUDIO_API_KEY"),
        ("HOST", "::", "PEFT_STUDIO_API_KEY"),
        ("ALLOWED_HOSTS", "a.example,b.example:8000", "without scheme and port"),
        ("ALLOWED_HOSTS", "*", "without scheme and port"),
        ("CORS_ORIGINS", "*", "name each origin"),
        ("CORS_ORIGINS", "http://localhost:3000/", "no slash"),
        ("CORS_ORIGINS", "localhost:3000", "not an origin"),
        ("CORS_ORIGINS", "http://a.example http://b.example", "not an origin"),
        ("EXECUTOR", "ray", "'local' is the one executor"),
        ("ENGINE_NICE", "20", "19"),
        ("ENGINE_NICE", "-5", "0"),
        ("IDLE_UNLOAD_S", "0", "greater than 0"),
        ("IDLE_UNLOAD_S", "30m", "valid number"),
        ("IDLE_UNLOAD_S", "nan", "greater than 0"),
        ("MAX_UPLOAD_BYTES", "5GB", "valid integer"),
        ("LOG_FORMAT", "xml", "'json'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_variable_and_a_reason(name: str, value: str, words: str) -> None:
    (problem,) = refusal_of(**{f"PEFT_STUDIO_{name}": value})
    assert problem.startswith(f"PEFT_STUDIO_{name}=") and words in problem


@pytest.mark.parametrize("key", [" canary", "canary\n", "canary-ключ", "canary-é", " "])
def test_a_key_that_no_client_can_send_is_refused_and_not_shown(key: str) -> None:
    (problem,) = refusal_of(PEFT_STUDIO_API_KEY=key)
    assert problem.startswith("PEFT_STUDIO_API_KEY: ") and "canary" not in problem


@pytest.mark.parametrize(
    "url",
    [
        "canary",
        "/var/canary.db",
        "mysql://user:canary@host/name",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///canary.db",
        "sqlite:///~nobody-of-this-name/canary.db",
    ],
)
def test_a_database_that_cannot_be_used_is_refused_and_not_shown(url: str) -> None:
    (problem,) = refusal_of(PEFT_STUDIO_DATABASE_URL=url)
    assert problem.startswith("PEFT_STUDIO_DATABASE_URL: ") and "canary" not in problem


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////var/lib/studio.db",
        "postgresql://user:p%40ss@host:5432/name?sslmode=require",
        "postgres://host/name",
        "postgresql+psycopg:///name?host=/run/postgresql",
    ],
)
def test_a_database_url_is_left_as_it_was_written(url: str) -> None:
    assert settings_of(PEFT_STUDIO_DATABASE_URL=url).database_url == url


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", "0.0.0.0", "[::]", "gpu-box.lan", "fe80::1%eth0"]
)
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert settings_of(PEFT_STUDIO_HOST=host, PEFT_STUDIO_API_KEY="k").host == host.strip("[]")


def test_origins_are_what_browsers_send() -> None:
    origins = ("http://localhost:3000", "https://a.example", "http://[::1]:5173", "tauri://localhost", "null")
    assert settings_of(PEFT_STUDIO_CORS_ORIGINS=", ".join(origins)).cors_origins == origins


def test_a_line_break_in_a_value_forges_no_second_line() -> None:
    (problem,) = refusal_of(PEFT_STUDIO_HOST="x\npeft-studio: all is well")
    assert "\n" not in problem


def _key_file(folder: Path, content: str = "sesame-canary\n", mode: int = 0o600) -> str:
    file = folder / "api-key"
    file.write_text(content)
    file.chmod(mode)
    return str(file)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_the_key_is_read_from_a_file_that_its_owner_alone_may_read(tmp_path: Path, mode: int) -> None:
    settings = settings_of(PEFT_STUDIO_API_KEY_FILE=_key_file(tmp_path, mode=mode), PEFT_STUDIO_HOST="0.0.0.0")
    assert settings.api_key is not None and settings.api_key.get_secret_value() == "sesame-canary"
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("sesame-canary", 0o644, "mode 0644"),
        ("sesame-canary", 0o660, "chmod 600"),
        ("", 0o600, "no client can send it"),
        ("sesame-canary\n\nmore", 0o600, "no client can send it"),
        ("sésame-canary", 0o600, "ASCII"),
        (None, 0, "cannot be read"),
    ],
)
def test_a_file_that_is_no_safe_key_is_refused_and_not_shown(
    tmp_path: Path, content: str | None, mode: int, words: str
) -> None:
    path = str(tmp_path / "none") if content is None else _key_file(tmp_path, content, mode)
    (problem,) = refusal_of(PEFT_STUDIO_API_KEY_FILE=path)
    assert problem.startswith("PEFT_STUDIO_API_KEY_FILE=") and words in problem and "canary" not in problem


def test_a_key_comes_from_one_place(tmp_path: Path) -> None:
    (problem,) = refusal_of(PEFT_STUDIO_API_KEY_FILE=_key_file(tmp_path), PEFT_STUDIO_API_KEY="canary")
    assert "both set" in problem and "canary" not in problem


def test_a_key_file_is_made_and_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "api-key"
    assert api_key_file.main([str(file)]) == 0
    key = file.read_text().strip()
    assert key in capsys.readouterr().out and len(key) >= 43
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert api_key_file.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert key not in said and str(file) in said and file.read_text().strip() == key
    settings = settings_of(PEFT_STUDIO_API_KEY_FILE=str(file))
    assert settings.api_key is not None and settings.api_key.get_secret_value() == key


def test_a_key_file_is_not_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "api-key").symlink_to(tmp_path / "elsewhere")
    assert api_key_file.main([str(tmp_path / "api-key")]) == 0
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "plain").touch()
    assert api_key_file.main([str(tmp_path / "plain" / "api-key")]) == 2
    assert "cannot be written" in capsys.readouterr().err
