"""A pytest plugin: fedkernels uses the extension that FEDKERNELS_EXTENSION names."""

from __future__ import annotations

import importlib.util
import os
import sys

NAME = "fedkernels._cpu"

_spec = importlib.util.spec_from_file_location(NAME, os.environ["FEDKERNELS_EXTENSION"])
assert _spec is not None
assert _spec.loader is not None
sys.modules[NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[NAME])
