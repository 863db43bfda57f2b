"""The dashboard serves without torch: that is a third of the memory that it may take."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = (
    "fedserver.dashboard.application",
    "fedserver.dashboard.alerts",
    "fedserver.dashboard.errands",
    # What handlers import when they are first asked.
    "fedserver.deployment.folder",
    "fedserver.deployment.invitation",
)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_of_the_dashboard_imports_torch(module: str) -> None:
    program = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
