"""Flower's SuperLink behind the front door: ``python -m fedserver.deployment.superlink ARGUMENTS``.

The front door judges the time that a node has signed when a request's headers are there, before its
body. Flower judges it again when the body is there as well, five minutes later at most: 2.4 MB on a
link of 64 kbit/s, and a SuperNode that is refused ends. Behind the front door it may take a day.
"""

from __future__ import annotations

import sys

from flwr.superlink.routers.fleet import node_auth

UPLOAD_SECONDS = 86400


def let_uploads_take_their_time() -> None:
    """Give this process's SuperLink the wider window, before it is started."""
    vars(node_auth)["TIMESTAMP_TOLERANCE"] = UPLOAD_SECONDS


if __name__ == "__main__":
    from flwr.superlink.cli.flower_superlink import flower_superlink

    let_uploads_take_their_time()
    sys.argv[0] = "flower-superlink"
    flower_superlink()
