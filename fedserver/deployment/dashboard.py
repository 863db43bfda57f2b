"""The dashboard of a deployed server as a process: ``python -m fedserver.deployment.dashboard DIR``.

It listens on loopback, and nginx is what others meet: TLS, rates and sizes. Who somebody is, and what
they may do, the dashboard decides by its own accounts and its OpenID provider, as it does anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedhost.ports import LOOPBACK
from fedserver.dashboard.accounts import AccountError, Accounts
from fedserver.dashboard.command import serve
from fedserver.dashboard.oidc import Provider, read_settings
from fedserver.deployment.folder import FolderError, ServerFolder, Settings, open_folder


def provider_of(settings: Settings) -> Provider | None:
    """The OpenID provider, None for none. It sends people back to the front door. Raises FolderError."""
    if not settings.oidc:
        return None
    try:
        found, secret = read_settings(Path(settings.oidc))
    except AccountError as error:
        raise FolderError(f"{error}; give another --oidc, or --oidc '' for none") from None
    here = found.address or settings.dashboard_address
    return Provider(found.model_copy(update={"address": here}), secret)


def require_people(folder: ServerFolder, settings: Settings) -> None:
    """Refuse to show runs to a network from which nobody could sign in. Raises FolderError."""
    if provider_of(settings) is None and not Accounts(folder.runs).names():
        raise FolderError(
            "the dashboard has no account yet: make one with"
            f" 'fedbraid accounts add {folder.runs} NAME --role operator', or name an OpenID provider"
            " with --oidc"
        )


def main(path: Path) -> None:
    """Serve the runs of a server's folder as its settings say, until stopped. Raises FolderError."""
    folder = open_folder(path)
    settings = folder.settings()
    serve(
        folder.runs,
        Accounts(folder.runs),
        host=LOOPBACK,
        port=folder.ports().dashboard,
        alerts=settings.alerts,
        provider=provider_of(settings),
    )


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except FolderError as error:
        sys.exit(f"error: {error}")
