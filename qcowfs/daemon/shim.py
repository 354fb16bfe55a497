"""The compiled part of the session, loaded where it was built.

Owns how it is loaded: before pyfuse3 and with its names visible to all, so that pyfuse3 finds them first.
Must not know what requests mean.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

INTERFACE = 3
"""What the compiled part has to be like; one that an older version left behind is as good as none."""


def _load() -> ModuleType | None:
    if "pyfuse3" in sys.modules:
        return None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        found = importlib.import_module("qcowfs.daemon._session")
    except ImportError:
        return None
    finally:
        sys.setdlopenflags(flags)
    return found if getattr(found, "INTERFACE", 0) == INTERFACE else None


session = _load()
"""The compiled part, or None where it is missing, of another version, or came too late."""
