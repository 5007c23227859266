"""What must be done before transformers is imported."""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from domain import protocol


def before_transformers() -> None:
    """Do what a process that will hold a base must do first: hide what is broken, and import what patches others."""
    hide_broken_torchvision()
    if os.environ.get(protocol.BACKEND_VARIABLE) == "unsloth":
        os.environ.setdefault("UNSLOTH_SKIP_TORCHVISION_CHECK", "1")
        import unsloth  # noqa: F401 - before transformers and PEFT, which it patches
    import_bitsandbytes()


def hide_broken_torchvision() -> bool:
    """Hide a torchvision whose operators do not match the installed torch. Text models do not need it.

    With a mismatched pair, modules of transformers fail with "operator torchvision::nms does not exist".

    Returns:
        Whether it was hidden.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return True
    return False


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, without torch's compiler.

    It decorates two functions with `torch.compile`, which imports the whole compiler: a fifth of an engine's imports
    and 40 MB, where those functions are seldom called. Here they are compiled when they are called for the first time.
    """
    import torch

    compile_now = torch.compile
    torch.compile = _compile_at_first_call(compile_now)  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return  # it is optional; what needs it says so
    finally:
        torch.compile = compile_now


def _compile_at_first_call(compile_now: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    def decorate(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return partial(decorate, **options)
        compiled: list[Callable[..., Any]] = []

        def call(*arguments: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **named)

        return call

    return decorate
