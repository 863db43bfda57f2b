"""Hypothesis without deadlines: a busy machine is slow, not wrong. In CI its examples are fixed."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fedbraid", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedbraid")
