"""The memory allocator of engines: tcmalloc, where the system has it.

glibc's allocator does not reuse freed aligned memory, and torch aligns every tensor
(docs/decisions/0011-the-engines-allocator.md).
"""

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from core.environment import without_secrets

# Debian's libtcmalloc-minimal4, Fedora's gperftools-libs, Arch's gperftools, and one built by hand.
_FOLDERS = (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
_LIBRARY = "libtcmalloc_minimal.so.4"
TCMALLOC_SYMBOL = "MallocExtension_ReleaseFreeMemory"  # gperftools, malloc_extension_c.h


@cache
def preload() -> Path | None:
    """Return the library that an engine is to be started with in LD_PRELOAD.

    Returns:
        None where engines keep the system's allocator. That is so if this interpreter cannot be started with any
        tcmalloc, or if LD_PRELOAD is set, even to nothing: the operator has then chosen an allocator.
    """
    if "LD_PRELOAD" in os.environ:
        return None
    files = (Path(folder) / _LIBRARY for folder in _FOLDERS)
    return next((path for path in files if path.is_file() and has_symbol(str(path), TCMALLOC_SYMBOL)), None)


@cache
def engines_have_tcmalloc() -> bool:
    """Whether engines on a CPU run with tcmalloc, by `preload` or because this process was started so."""
    chosen = os.environ.get("LD_PRELOAD", "")
    return preload() is not None or (chosen != "" and has_symbol(chosen, TCMALLOC_SYMBOL))


def has_symbol(libraries: str, symbol: str) -> bool:
    """Whether a Python that is started with LD_PRELOAD set to `libraries` has a symbol.

    The loader skips a library that it cannot use, such as one for 32 bits. Only a trial shows whether it was loaded.
    """
    look = [sys.executable, "-I", "-S", "-c", f"import ctypes; ctypes.CDLL(None).{symbol}"]
    environment = {**without_secrets(os.environ), "LD_PRELOAD": libraries}
    return subprocess.run(look, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 0
