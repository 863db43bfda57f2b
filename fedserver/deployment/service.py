"""The gatekeeper as a process: ``python -m fedserver.deployment.service DIR``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvicorn

from fedhost.ports import LOOPBACK
from fedhost.probes import answers_https
from fedserver.deployment.flower_control import FlowerControl
from fedserver.deployment.folder import open_folder
from fedserver.deployment.gatekeeper import Gatekeeper
from fedserver.deployment.registry import Registry

# nginx closes its idle connections after 60 s; it must be the first to.
KEEP_ALIVE_SECONDS = 90


async def serve(path: Path) -> None:
    """Serve until the process is told to stop."""
    folder = open_folder(path)
    ports = folder.ports()
    registry = Registry(folder.registry)
    gatekeeper = Gatekeeper(
        registry,
        FlowerControl(ports.superlink, folder.loopback_identity.authority),
        folder.identity(folder.settings()).authority.read_bytes(),
        lambda: answers_https(ports.superlink, authority=folder.loopback_identity.authority),
    )
    # What was invited, revoked or joined while Flower was down.
    await gatekeeper.follow()
    server = uvicorn.Server(
        uvicorn.Config(
            gatekeeper.application(),
            host=LOOPBACK,
            port=ports.gatekeeper,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
    )
    try:
        await server.serve()
    finally:
        registry.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
