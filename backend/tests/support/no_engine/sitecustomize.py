"""Python runs this file at its start where its folder is on PYTHONPATH: the children of a fast test are guarded too."""

import os
import sys
from importlib import import_module

# Some tests start older Pythons, which would not understand the hook.
if sys.version_info >= (3, 11) and "NO_ENGINE_RECORD" in os.environ:
    import_module("no_engine_hook").install()
