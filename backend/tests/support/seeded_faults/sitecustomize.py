"""Python runs this file at its start where its folder is on PYTHONPATH: it wraps two functions of an engine."""

import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = "TESTS_SEEDED_FAULT"


def fault() -> list[str]:
    return Path(os.environ[FILE]).read_text().split()


def spoil_what_is_written(module: ModuleType) -> None:
    """Change the weights' file between its writing and its sums."""
    write: Callable[..., None] = module._write_weights

    def wrong(merged: Any, folder: Path, *rest: Any) -> None:
        write(merged, folder, *rest)
        match fault():
            case ["lose", name]:
                _edit(folder, lambda tensors: tensors.pop(name))
            case ["change", name]:
                _edit(folder, lambda tensors: tensors.update({name: tensors[name] * 1.03}))

    module._write_weights = wrong  # type: ignore[attr-defined]


def _edit(folder: Path, act: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    act(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def hold_up_the_check(module: ModuleType) -> None:
    check: Callable[..., Any] = module.check_export

    def late(command: Any, channel: Any) -> Any:
        while fault() == ["wait"]:
            time.sleep(0.01)
        return check(command, channel)

    module.check_export = late  # type: ignore[attr-defined]


WRAPPED = {"engine.merge": spoil_what_is_written, "engine.export_check": hold_up_the_check}


class Finder:
    """Wraps a module as soon as it has been run."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            WRAPPED[name](module)

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


if FILE in os.environ:
    sys.meta_path.insert(0, Finder)
