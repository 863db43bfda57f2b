"""The dashboard of a deployed server as a process: ``python -m fedserver.deployment.dashboard DIR``.

It listens on loopback, and nginx is what others meet: TLS, rates and sizes. Who somebody is, and what
they may do, the dashboard decides by its own accounts, as it does anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedhost.ports import LOOPBACK
from fedserver.dashboard.accounts import Accounts
from fedserver.dashboard.command import serve
from fedserver.deployment.folder import FolderError, ServerFolder, open_folder


def require_accounts(folder: ServerFolder) -> None:
    """Refuse to show runs to a network that nobody has an account for. Raises FolderError."""
    if not Accounts(folder.runs).names():
        raise FolderError(
            "the dashboard has no account yet: make one with"
            f" 'fedbraid accounts add {folder.runs} NAME --role operator'"
        )


if __name__ == "__main__":
    opened = open_folder(Path(sys.argv[1]))
    serve(opened.runs, Accounts(opened.runs), host=LOOPBACK, port=opened.ports().dashboard)
