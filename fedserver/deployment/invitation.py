"""Inviting a device: a one-time token for it, and the command that it joins with."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedhost.enrolment import EnrolmentRefused, Token, fingerprint_of
from fedhost.node_names import NAME_LENGTH, is_node_name
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.registry import Registry

SECONDS_AN_HOUR = 3600.0
MOST_HOURS = 24.0 * 365


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
        EnrolmentRefused: a node of that name has joined, or no scenario could name one so, or nobody
            could use the token.
        FolderError: the folder is no server's.
    """
    if not is_node_name(name):
        raise EnrolmentRefused(
            "bad-request",
            f"{name[:NAME_LENGTH]!r} is no node's name: write letters, digits, spaces and . _ -, at most"
            f" {NAME_LENGTH}, the first a letter or digit",
        )
    if not 0 < hours <= MOST_HOURS:
        raise EnrolmentRefused(
            "bad-request",
            f"--hours {hours:g}: a token is valid for more than 0 hours, and for a year at most",
        )
    settings = folder.settings()
    token = Token.new(fingerprint_of(folder.identity(settings).authority.read_bytes()))
    registry = Registry(folder.registry)
    try:
        registry.invite(name, token, time.time() + hours * SECONDS_AN_HOUR)
    finally:
        registry.close()
    return Invitation(name, f"https://{settings.address}", str(token), hours)
