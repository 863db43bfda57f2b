"""Where a dashboard keeps what is its own: accounts, the ledger of invitations, logs of its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedserver.deployment.folder import ServerFolder

FOLDER = ".dashboard"
SETTINGS = "server.toml"


def deployment_of(root: Path) -> ServerFolder | None:
    """The server's folder that is served, itself or by its runs; None where it is none."""
    from fedserver.deployment.folder import ServerFolder

    root = root.resolve()
    for folder in (root, root.parent) if root.name == "runs" else (root,):
        if (folder / SETTINGS).is_file():
            return ServerFolder(folder)
    return None


def home_of(root: Path) -> Path:
    """The dashboard's own folder: one of a deployment, whether it is served itself or by its runs."""
    deployment = deployment_of(root)
    return (root if deployment is None else deployment.runs) / FOLDER
