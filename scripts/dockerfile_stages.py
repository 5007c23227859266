"""Reads the Dockerfile: its stages in the order of building, and what their instructions say.

Only the instructions and forms that the Dockerfile uses are known. Everything else raises Unknown, so that nobody takes
a step for done that was not.
"""

import io
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from dockerfile_parse import DockerfileParser

_SETTINGS = frozenset({"CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"})
_KNOWN = _SETTINGS | {"ARG", "COPY", "RUN"}
_FLAGS = {
    "COPY": {"from"},
    "RUN": {"mount"},
    "HEALTHCHECK": {"interval", "timeout", "start-period", "retries"},
}
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_FLAG = re.compile(r"--([a-z-]+)=(\S+)\s+")


class Unknown(Exception):
    """The Dockerfile has an instruction, or a form of one, that is not known here."""


@dataclass(frozen=True)
class Step:
    """One instruction.

    Attributes:
        keyword: As RUN.
        flags: What stands before the value, as {"from": "environment"}.
        value: The rest, its lines joined.
        line: Where it begins, from 1.
    """

    keyword: str
    flags: Mapping[str, str]
    value: str
    line: int

    @property
    def words(self) -> list[str]:
        """The value, split as a shell does."""
        return shlex.split(self.value)

    def json(self) -> list[str]:
        """Give the value of the JSON form, which starts the program without a shell.

        Raises:
            Unknown: It has another form.
        """
        try:
            words = json.loads(self.value)
        except ValueError as error:
            raise Unknown(f"line {self.line}: {self.keyword} is not in its JSON form: {self.value}") from error
        return [str(word) for word in words]


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it.

    Attributes:
        name: The name after AS, or the number of a stage without one.
        base: The stage or image that it begins from.
        steps: Its instructions.
    """

    name: str
    base: str
    steps: tuple[Step, ...]

    @property
    def sources(self) -> set[str]:
        """The stages or images that files are copied from."""
        return {step.flags["from"] for step in self.steps if "from" in step.flags}


@dataclass
class Image:
    """What an image says of the containers that are made of it.

    Attributes:
        environment: The environment's variables.
        folder: The working directory.
        user: Numeric user and group, as "10001:10001".
        entrypoint: What `command` is handed to.
        command: The program that is started where none is named.
        health: The program that ends with 0 in a healthy container.
        stop_signal: What asks the first process to end.
        volumes: The folders that outlive a container.
    """

    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"
    volumes: list[str] = field(default_factory=list)

    def copy(self) -> Self:
        """Give a copy for a stage that begins from this one."""
        return type(self)(
            dict(self.environment),
            self.folder,
            self.user,
            list(self.entrypoint),
            list(self.command),
            list(self.health),
            self.stop_signal,
            list(self.volumes),
        )

    def apply(self, step: Step, arguments: Mapping[str, str]) -> None:
        """Take in an instruction that changes the image's settings and no file.

        Args:
            step: The instruction.
            arguments: What ARG declares in its stage; ENV may name it.

        Raises:
            Unknown: Its form is not known.
        """
        known = {**arguments, **self.environment}
        match step.keyword:
            case "ENV":
                self.environment |= _variables(step, known)
            case "WORKDIR":
                self.folder = expand(step.value, known)
            case "USER":
                self.user = _numeric_user(step)
            case "ENTRYPOINT":
                self.entrypoint, self.command = step.json(), []
            case "CMD":
                self.command = step.json()
            case "HEALTHCHECK":
                self.health = _health_command(step)
            case "STOPSIGNAL":
                self.stop_signal = step.value
            case "VOLUME":
                self.volumes += step.json()
            case "EXPOSE":
                pass  # says which port is meant; opens none
            case _:
                raise Unknown(f"line {step.line}: {step.keyword} is no setting of an image")


def _variables(step: Step, known: Mapping[str, str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in step.words]
    if not all(equals for _, equals, _ in pairs):
        raise Unknown(f"line {step.line}: ENV is not in the form NAME=VALUE")
    # All values of one instruction see the variables as they were before it.
    return {name: expand(value, known) for name, _, value in pairs}


def _numeric_user(step: Step) -> str:
    if re.fullmatch(r"\d+:\d+", step.value) is None:
        raise Unknown(f"line {step.line}: USER is not in the form UID:GID, in numbers")
    return step.value


def _health_command(step: Step) -> list[str]:
    if not step.value.startswith("CMD "):
        raise Unknown(f"line {step.line}: HEALTHCHECK without CMD")
    return Step("CMD", {}, step.value.removeprefix("CMD "), step.line).json()


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME}; a name without a value gives nothing, as in a Dockerfile."""
    return _VARIABLE.sub(lambda variable: variables.get(variable[1] or variable[2], ""), text)


def _step(instruction: Mapping[str, str | int]) -> Step:
    keyword, value, line = str(instruction["instruction"]), str(instruction["value"]), int(instruction["startline"]) + 1
    if keyword not in _KNOWN:
        raise Unknown(f"line {line}: {keyword}")
    flags: dict[str, str] = {}
    while (flag := _FLAG.match(value)) is not None:
        flags[flag[1]] = flag[2]
        value = value[flag.end() :]
    if flags.keys() - _FLAGS.get(keyword, set()) or value.startswith("--") or "<<" in value:
        raise Unknown(f"line {line}: {keyword} {value}")
    return Step(keyword, flags, value.strip(), line)


def stages_of(dockerfile: Path, arguments: Mapping[str, str]) -> list[Stage]:
    """Read the stages that the last one needs, each after those that it begins from or copies from.

    Args:
        dockerfile: The file.
        arguments: Values in place of those that ARG gives before the first FROM.

    Raises:
        Unknown: It has something that is not known here.
    """
    parsed = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes())).structure
    instructions = [instruction for instruction in parsed if instruction["instruction"] != "COMMENT"]
    first = next(place for place, instruction in enumerate(instructions) if instruction["instruction"] == "FROM")
    values: dict[str, str] = {}
    for step in map(_step, instructions[:first]):
        name, _, default = step.value.partition("=")
        values[name] = arguments.get(name, default)
    stages: dict[str, Stage] = {}
    for instruction in instructions[first:]:
        if instruction["instruction"] == "FROM":
            base, _, name = expand(instruction["value"], values).partition(" AS ")
            name = name or str(len(stages))
            stages[name] = Stage(name, base, ())
        else:
            stage = stages[name]
            stages[name] = Stage(name, stage.base, (*stage.steps, _step(instruction)))
    return _in_order(stages, stages[name])


def _in_order(stages: Mapping[str, Stage], last: Stage) -> list[Stage]:
    order: list[Stage] = []
    for name in (last.base, *sorted(last.sources)):
        if name in stages:
            order += [stage for stage in _in_order(stages, stages[name]) if stage not in order]
    return [*order, last]


def arguments_of(stage: Stage, given: Mapping[str, str]) -> dict[str, str]:
    """Give the variables that ARG declares in a stage: what was given, else the default; with neither it is unset."""
    values: dict[str, str] = {}
    for step in stage.steps:
        if step.keyword == "ARG":
            name, equals, default = step.value.partition("=")
            if name in given or equals:
                values[name] = given.get(name, default)
    return values
