"""The folder that ``flwr run`` takes: the two files beside this one and a pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

PROJECT = """
[project]
name = "plain"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedbraid"

[tool.flwr.app.components]
serverapp = "plain.server_app:app"
clientapp = "plain.client_app:app"

[tool.flwr.app.config]
times = ""
rounds = 3
"""


def write(folder: Path) -> Path:
    """Write the app into a folder."""
    package = folder / "plain"
    package.mkdir(parents=True)
    for name in ("__init__.py", "client_app.py", "server_app.py"):
        shutil.copy(Path(__file__).with_name(name), package / name)
    (folder / "pyproject.toml").write_text(PROJECT)
    return folder
