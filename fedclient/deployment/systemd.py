"""A systemd user unit that keeps a device's node running across logins and restarts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from fedclient.deployment.settings import NodeFolder

UNIT = """\
[Unit]
Description=fedbraid node {name}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={python} -m fedclient.deployment.processes {folder}
Restart=on-failure
RestartSec=10
# An error for a person is not mended by starting again.
RestartPreventExitStatus=1
KillMode=mixed
TimeoutStopSec=60
NoNewPrivileges=yes
UMask=0077

[Install]
WantedBy=default.target
"""


def unit_text(folder: NodeFolder, name: str) -> str:
    """The unit of one node; systemd's specifiers and spaces in paths are escaped."""
    return UNIT.format(
        name=name.replace("%", "%%"),
        python=_quoted(sys.executable),
        folder=_quoted(str(folder.path)),
    )


def unit_file(name: str) -> Path:
    """Where a node's unit belongs."""
    configuration = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    return Path(configuration).expanduser() / "systemd" / "user" / f"fedbraid-{safe}.service"


def install(folder: NodeFolder, name: str) -> str:
    """Write the unit and start it where a systemd is there to do so; returns what was done."""
    file = unit_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(unit_text(folder, name))
    if _systemctl("daemon-reload") and _systemctl("enable", "--now", file.name):
        return f"unit {file.name} is enabled; 'loginctl enable-linger' keeps it without a login"
    return f"unit {file} is written; start it with: systemctl --user enable --now {file.name}"


def remove(name: str) -> None:
    """Disable and delete a node's unit, if there is one."""
    file = unit_file(name)
    if file.exists():
        _systemctl("disable", "--now", file.name)
        file.unlink()
        _systemctl("daemon-reload")


def _systemctl(*words: str) -> bool:
    if shutil.which("systemctl") is None:
        return False
    done = subprocess.run(["systemctl", "--user", *words], capture_output=True)
    return done.returncode == 0


def _quoted(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
