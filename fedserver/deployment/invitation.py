"""Inviting a device: a one-time token for it, and the command that it joins with."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedhost.enrolment import Token, fingerprint_of
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.registry import Registry

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class Invitation:
    """A token as it was made, once: the server keeps but hashes of it. ``hours``: how long it holds."""

    name: str
    url: str
    token: str
    hours: float

    @property
    def command(self) -> str:
        """What is run on the device."""
        return f"fedbraid client join {self.url} --token {self.token}"


def invite(folder: ServerFolder, name: str, hours: float) -> Invitation:
    """Make an invitation for a node of that name; an unused one of that name is replaced.

    Raises:
        EnrolmentRefused: a node of that name has joined.
        FolderError: the folder is no server's.
    """
    settings = folder.settings()
    token = Token.new(fingerprint_of(folder.identity(settings).authority.read_bytes()))
    registry = Registry(folder.registry)
    try:
        registry.invite(name, token, time.time() + hours * SECONDS_AN_HOUR)
    finally:
        registry.close()
    return Invitation(name, f"https://{settings.address}", str(token), hours)
