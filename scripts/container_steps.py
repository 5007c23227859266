"""Builds and runs the Dockerfile's image without a container engine: a part of CI, `make check-container`.

Every step of the Dockerfile is done, in a root directory made of overlay mounts over this machine's own system, which
stands for the base image (`container_root`). Then the image is used as a container engine would use it, by its own
ENTRYPOINT, CMD, USER, HEALTHCHECK and STOPSIGNAL, with no network but loopback:

    without a key it refuses to start, since it would listen beyond loopback;
    with one it starts, the health check succeeds, no process is root's, and the stop signal ends it;
    `quickstart` trains the embedded model.

Where this machine's pip has a folder of packages, the environment comes from there (`_arguments_here`).

It needs Linux and root, as a container engine does. This machine is left as it was: what is written goes into a folder
that is deleted at the end. What is downloaded stays in the cache of the Dockerfile's cache mounts.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from container_root import OVERLAID, Base, Root, first_process, leave_the_network
from docker.utils import exclude_paths
from dockerfile_stages import Image, Stage, Step, Unknown, arguments_of, expand, stages_of

ROOT = Path(__file__).parent.parent
_STEP_LIMIT_S = 1800  # 3 GB of packages over a slow line
_HEALTHY_LIMIT_S = 180
_REFUSAL_LIMIT_S = 60
_STOP_LIMIT_S = 60
_QUICKSTART_LIMIT_S = 1800
_KEY = "a key for one minute"
# Two threads on a machine whose cores have other work wait for each other most of the time.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Failed(Exception):
    """A step or a check failed; the message says which."""


class Build:
    """Does the steps of the stages, each in a root of its own.

    Args:
        folder: An empty folder for everything that is written.
        context: The folder that COPY copies from.
        arguments: Values for ARG.
    """

    def __init__(self, folder: Path, context: Path, arguments: Mapping[str, str]) -> None:
        self._folder, self._context, self._arguments = folder, context, arguments
        ignored = [
            line for line in (context / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
        ]
        self._files = {path for path in exclude_paths(str(context), ignored) if (context / path).is_file()}
        self._base = Base(folder / "base")
        self._roots: dict[str, Root] = {}
        self._images: dict[str, Image] = {}

    def stage(self, stage: Stage) -> tuple[Root, Image]:
        """Do the steps of one stage.

        Returns:
            Its root and its settings.

        Raises:
            Failed: A step failed.
            Unknown: The Dockerfile has something that is not known here.
        """
        _say(f"stage {stage.name}, from {stage.base}")
        root = Root(self._folder / stage.name, self._base, self._roots.get(stage.base))
        begun = self._images.get(stage.base)
        image = begun.copy() if begun is not None else Image(environment={"PATH": self._base.path})
        self._roots[stage.name], self._images[stage.name] = root, image
        declared = arguments_of(stage, self._arguments)
        for step in stage.steps:
            _say(f"line {step.line}: {step.keyword} {step.value}")
            match step.keyword:
                case "RUN":
                    self._run(step, root, image, declared)
                case "COPY":
                    self._copy(step, root, image)
                case "ARG":
                    pass
                case _:
                    image.apply(step, declared)
                    root.inside(image.folder).mkdir(parents=True, exist_ok=True)  # WORKDIR makes it
        return root, image

    def _run(self, step: Step, root: Root, image: Image, declared: Mapping[str, str]) -> None:
        for name, value in step.flags.items():
            options = dict(option.partition("=")[::2] for option in value.split(","))
            if options.keys() != {"type", "target"} or options["type"] != "cache":
                raise Unknown(f"line {step.line}: RUN --{name}={value}")
            cache = Path(options["target"])  # on this machine the same folder
            cache.mkdir(parents=True, exist_ok=True)
            root.show(cache, str(cache))
        environment = {"HOME": "/root", **declared, **image.environment}
        process = root.start(["/bin/sh", "-c", step.value], environment, image.folder, image.user)
        status = _wait(process, _STEP_LIMIT_S, f"line {step.line}: RUN")
        if status != 0:
            raise Failed(f"line {step.line}: RUN ended with status {status}")

    def _copy(self, step: Step, root: Root, image: Image) -> None:
        *sources, target = (expand(word, image.environment) for word in step.words)
        if not target.startswith("/"):
            raise Unknown(f"line {step.line}: COPY with a relative target")
        for source in sources:
            if (stage := step.flags.get("from")) is not None:
                _copy_folder(self._roots[stage].inside(source), root.inside(target))
            else:
                self._copy_from_context(step, source.rstrip("/"), root.inside(target), target.endswith("/"))

    def _copy_from_context(self, step: Step, source: str, target: Path, into: bool) -> None:
        inside = [path for path in self._files if path == source or Path(source) in Path(path).parents]
        if not inside:
            raise Failed(f"line {step.line}: COPY {source}: no such file, or .dockerignore leaves it out")
        for path in inside:
            if path == source:
                place = target / Path(source).name if into else target
            else:  # what is in a folder is copied, not the folder
                place = target / Path(path).relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._context / path, place)
            os.chown(place, 0, 0)


class Container:
    """Uses the finished image as a container engine would, in a network without anything but loopback.

    Args:
        root: The root of the last stage.
        image: Its settings.
    """

    def __init__(self, root: Root, image: Image) -> None:
        self._root, self._image = root, image

    def start(self, command: list[str], further: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start a container with a command, and with further variables."""
        environment = {**self._image.environment, **further}
        whole = [*self._image.entrypoint, *command]
        return self._root.start(whole, environment, self._image.folder, self._image.user)

    def healthy(self) -> bool:
        """Run the health check once."""
        image = self._image
        return self._root.start(image.health, image.environment, image.folder, image.user).wait(60) == 0

    def check_refusal(self) -> None:
        """The server must not listen beyond loopback without a key.

        Raises:
            Failed: It started.
        """
        status = _wait(self.start(self._image.command, {}), _REFUSAL_LIMIT_S, "the server without a key")
        if status != 2:
            raise Failed(f"without a key the server ended with status {status} instead of 2")

    def check_service(self) -> None:
        """Start the server, wait until it is healthy, look at its processes, stop it.

        Raises:
            Failed: One of that did not happen.
        """
        process = self.start(self._image.command, {"PEFT_STUDIO_API_KEY": _KEY})
        try:
            began = time.monotonic()
            while not self.healthy():
                if process.poll() is not None:
                    raise Failed(f"the server ended with status {process.returncode}")
                if time.monotonic() - began > _HEALTHY_LIMIT_S:
                    raise Failed(f"the server is not healthy after {_HEALTHY_LIMIT_S} s")
                time.sleep(0.5)
            _say(f"healthy after {time.monotonic() - began:.1f} s")
            self._check_users(process)
            os.kill(first_process(process), signal.Signals[self._image.stop_signal])
            status = _wait(process, _STOP_LIMIT_S, f"the server, sent {self._image.stop_signal},")
            _say(f"{self._image.stop_signal} ended it, with status {status}")
        finally:
            process.kill()
            process.wait()
        if self.healthy():
            raise Failed("the health check succeeds with no server")

    def _check_users(self, started: "subprocess.Popen[bytes]") -> None:
        uid = int(self._image.user.partition(":")[0])
        first = first_process(started)
        processes = [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]
        users = {Path(f"/proc/{process}").stat().st_uid for process in processes}
        if uid == 0 or users != {uid}:
            raise Failed(f"the container's processes belong to the users {sorted(users)}, not to {uid}")

    def check_quickstart(self) -> None:
        """Run the main job.

        Raises:
            Failed: It failed, or its result is not in the volume.
        """
        status = _wait(self.start(["quickstart"], _ONE_THREAD), _QUICKSTART_LIMIT_S, "the quickstart")
        if status != 0:
            raise Failed(f"the quickstart ended with status {status}")
        home = self._root.inside(self._image.environment["PEFT_STUDIO_HOME"])
        if self._image.environment["PEFT_STUDIO_HOME"] not in self._image.volumes or not any(home.iterdir()):
            raise Failed("what the quickstart leaves is not in the volume")


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder with its links, owners and modes."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", f"{source}/.", str(target)], check=True)


def _wait(process: "subprocess.Popen[bytes]", limit_s: float, what: str) -> int:
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{what} did not end within {limit_s:g} s") from error
    finally:
        process.kill()
        process.wait()


def _place() -> Path:
    """Give a folder on the disk of the project, or of the temporary files if that part of the system is overlaid."""
    cache = ROOT / ".cache"
    if ROOT.parts[1] in OVERLAID:
        return Path(tempfile.gettempdir())
    cache.mkdir(exist_ok=True)
    return cache


def _say(text: str) -> None:
    print(f"--- {text}", flush=True)


def _arguments_here() -> dict[str, str]:
    """Give values for ARG that take packages from where this machine's pip takes them.

    A folder of packages (PIP_FIND_LINKS) may have a torch of its own, whose hash is not in the tested set. Where there
    is no such folder, the Dockerfile's defaults hold.
    """
    given = {name: os.environ[name] for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX") if name in os.environ}
    if (folders := os.environ.get("UV_FIND_LINKS") or ",".join(os.environ.get("PIP_FIND_LINKS", "").split())) != "":
        unchecked = {"UV_REQUIRE_HASHES": "0", "UV_NO_VERIFY_HASHES": "1"}
        given |= {"TORCH": "cuda", "UV_FIND_LINKS": folders, **unchecked}
    return given


def _inside(folder: Path, arguments: Mapping[str, str]) -> None:
    build = Build(folder, ROOT, arguments)
    for stage in stages_of(ROOT / "Dockerfile", arguments):
        root, image = build.stage(stage)
    leave_the_network()
    container = Container(root, image)
    for name, check in (
        ("without a key", container.check_refusal),
        ("the server", container.check_service),
        ("quickstart", container.check_quickstart),
    ):
        _say(name)
        check()


def main() -> int:
    """Build and check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker's")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        try:
            _inside(given.inside, _arguments_here() | dict(argument.split("=", 1) for argument in given.build_arg))
        except (Failed, Unknown, OSError) as error:
            print(f"The image: {error}", flush=True)
            return 1
        _say("every step of the Dockerfile works")
        return 0
    if platform.system() != "Linux":
        print("NOT CHECKED: the steps of the Dockerfile run on Linux only.")
        return 0
    if os.geteuid() != 0:
        print("The steps of the Dockerfile need root, as a container engine does.")
        return 1
    # The mounts are those of the process that is started: when the folder is deleted, nothing of this machine is seen
    # below it. Whatever ends this process, be it SIGKILL, ends that one and every process below it.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="container-", dir=_place()) as folder:
        own = ["setpriv", "--pdeathsig", "KILL"]
        own += ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        own += [sys.executable, __file__, "--inside", folder]
        return subprocess.run([*own, *(f"--build-arg={one}" for one in given.build_arg)], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
