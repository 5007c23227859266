"""What must be done before transformers is imported."""

import os
import sys

from domain import protocol


def before_transformers() -> None:
    """Do what a process that will hold a base must do first: hide what is broken, and import what patches others."""
    hide_broken_torchvision()
    if os.environ.get(protocol.BACKEND_VARIABLE) == "unsloth":
        os.environ.setdefault("UNSLOTH_SKIP_TORCHVISION_CHECK", "1")
        import unsloth  # noqa: F401 - before transformers and PEFT, which it patches


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
