"""Faults that are put into exports while a real server writes and checks them, by the engines' Python.

A server that starts with `environment` has engines in which `sitecustomize` wraps what writes a merged model and what
checks it. The file says what goes wrong from then on; an empty one says that nothing does.
"""

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FILE = "TESTS_SEEDED_FAULT"


def environment(fault: Path) -> dict[str, str]:
    """Return the environment of a server whose exports get the fault that a file names.

    Args:
        fault: The file: `lose NAME`, `change NAME`, `wait`, or nothing.
    """
    fault.write_text("")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")])), FILE: str(fault)}
