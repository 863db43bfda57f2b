"""A device's folder: one configuration file, two keys, the pinned authority, and what processes leave.

node.toml              what joining settled, and the node's own settings
authority.crt          the only authority whose server this device talks to
keys/transport         EC P-256 (OpenSSH form): Flower's node authentication
keys/update.pem        Ed25519: signs updates
flower/, bin/          Flower's home of this node, and the lean app stub
worker/                the resident worker's socket and last replies
logs/, status.json     of the supervised processes
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedclient.resident.settings import ResidentSettings
from fedhost.private_files import make_private_folder, write_private

# The SuperNode's exit code that says: the server has shut this node out, and starting again is no use.
SHUT_OUT = 77

# All that the program makes in the folder, as patterns; what is not named here is somebody's own.
# The settings come last: a deletion that is cut off can be asked for again.
MADE_BY_RUNNING = (
    "worker",
    "flower",
    "bin/flwr-clientapp",
    "bin/flwr-clientapp.*.part",
    "logs/*.log",
    "logs/*.log.1",
    "status.json",
)
MADE_BY_JOINING = (
    "keys/transport",
    "keys/update.pem*.part",
    "keys/update.pem",
    "superexec.secret",
    "authority.crt",
    "node.toml",
)


class NodeFolderError(Exception):
    """What is wrong with a device's folder, and what to do."""


@dataclass(frozen=True)
class NodeFile:
    """``node.toml``. ``application``: SHA-256 of the only app bundle that this device runs.

    ``node`` is handed to Flower as the node's configuration: ``data``, ``partition-id``, ``rank-limit``.
    ``worker`` limits the resident worker: the fields of ``ResidentSettings`` but its folder.
    """

    server: str
    name: str
    application: str
    node: dict[str, Any] = field(default_factory=dict)
    worker: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeFolder:
    """Paths and stored values of one device's folder."""

    path: Path

    @property
    def file(self) -> Path:
        """The configuration file."""
        return self.path / "node.toml"

    @property
    def authority(self) -> Path:
        """The certificate of the pinned authority."""
        return self.path / "authority.crt"

    @property
    def transport_key_file(self) -> Path:
        """The key of Flower's node authentication."""
        return self.path / "keys" / "transport"

    @property
    def update_key_file(self) -> Path:
        """The key that signs updates."""
        return self.path / "keys" / "update.pem"

    @property
    def superexec_secret(self) -> Path:
        """What the SuperExec proves itself by to the SuperNode on this device."""
        return self.path / "superexec.secret"

    @property
    def flower(self) -> Path:
        """Flower's home of this node."""
        return self.path / "flower"

    def foreign(self) -> list[str]:
        """Names of what lies in the folder and is not of a join that was cut off, sorted."""
        keys = self.path / "keys"
        made = {keys, *self._found(MADE_BY_JOINING)}
        return self._names(
            one
            for folder in (self.path, keys)
            if folder.is_dir()
            for one in folder.iterdir()
            if one not in made
        )

    def delete(self) -> list[str]:
        """Delete what the program made, and the folder if it is empty then; what was left, sorted."""
        for one in list(self._found([*MADE_BY_RUNNING, *MADE_BY_JOINING])):
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one)
            else:
                one.unlink(missing_ok=True)
        for name in ("bin", "logs", "keys", "."):
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        return self._names(self.path.iterdir()) if self.path.exists() else []

    def _found(self, patterns: Iterable[str]) -> Iterator[Path]:
        """What matches, and the drafts of it that killed writers left."""
        for pattern in patterns:
            parent, _, name = pattern.rpartition("/")
            yield from (self.path / parent).glob(name)
            yield from (self.path / parent).glob(f".{name}.[0-9]*")

    def _names(self, paths: Iterable[Path]) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in paths)

    def resident(self) -> ResidentSettings:
        """The resident worker of this device. Raises NodeFolderError for settings that it has not."""
        try:
            return ResidentSettings(self.path / "worker", **self.read().worker)
        except TypeError as error:
            raise NodeFolderError(f"{self.file}: [worker]: {error}") from None

    def read(self) -> NodeFile:
        """The configuration. Raises NodeFolderError if this device has not joined."""
        try:
            return NodeFile(**tomllib.loads(self.file.read_text()))
        except FileNotFoundError:
            raise NodeFolderError(
                f"{self.path} has joined no server: 'fedbraid client join URL --token TOKEN'"
            ) from None
        except (tomllib.TOMLDecodeError, TypeError) as error:
            raise NodeFolderError(f"{self.file}: {error}") from None

    def write(self, content: NodeFile) -> None:
        """Store the configuration."""
        write_private(self.file, tomli_w.dumps(asdict(content)))

    def transport_key(self) -> ec.EllipticCurvePrivateKey:
        """The key of Flower's node authentication, made if there is none yet."""
        path = self.transport_key_file
        if not path.exists():
            make_private_folder(path.parent)
            made = ec.generate_private_key(ec.SECP256R1())
            form = serialization.PrivateFormat.OpenSSH
            write_private(
                path,
                made.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()),
            )
        try:
            key = serialization.load_ssh_private_key(path.read_bytes(), None)
        except ValueError:
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise NodeFolderError(f"{path} holds no EC key: restore it, or leave and join anew")
        return key


def open_folder(path: Path) -> NodeFolder:
    """The folder of a device, by an absolute path."""
    return NodeFolder(path.expanduser().resolve())
