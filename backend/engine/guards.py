"""What must be true before transformers is imported."""

import sys


def hide_broken_torchvision() -> bool:
    """Hide a torchvision whose operators do not match the installed torch; text models need none.

    With a mismatched pair, transformers modules fail with "operator torchvision::nms does not exist".

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
