"""The memory allocator of engines: tcmalloc, where the system has it.

glibc's does not reuse what is freed of aligned memory, and torch aligns every tensor
(docs/decisions/0011-the-engines-allocator.md).
"""

import os
import platform
from functools import cache
from pathlib import Path

# Debian's libtcmalloc-minimal4, Fedora's gperftools-libs, Arch's gperftools, and one built by hand.
_FOLDERS = (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
_LIBRARY = "libtcmalloc_minimal.so.4"


@cache
def preload() -> Path | None:
    """Return the library that an engine is to be started with in LD_PRELOAD.

    Returns:
        None where the system's own allocator stays: there is no tcmalloc, or whoever started this process has set
        LD_PRELOAD, be it to nothing, and so has chosen one.
    """
    if "LD_PRELOAD" in os.environ:
        return None
    return next((path for folder in _FOLDERS if (path := Path(folder) / _LIBRARY).is_file()), None)
