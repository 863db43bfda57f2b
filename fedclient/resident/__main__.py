"""``python -m fedclient.resident --folder DIR``: run a resident worker in the foreground."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedclient.resident.service import serve_until_signalled
from fedclient.resident.settings import NICE, ResidentSettings, SettingsError


def main() -> int:
    """Run until SIGTERM or SIGINT; 2 for settings that cannot work."""
    parser = argparse.ArgumentParser(prog="python -m fedclient.resident", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="socket and last replies; 0700")
    parser.add_argument("--memory-mb", type=int, help="private memory of the model's process")
    parser.add_argument("--cpus", type=int, help="cores that it may run on")
    parser.add_argument("--nice", type=int, default=NICE, help="its priority; 19 is the lowest")
    parser.add_argument("--pause-on-battery", action="store_true")
    parser.add_argument("--pause-command", help="no work while this shell command exits with 0")
    given = parser.parse_args()
    settings = ResidentSettings(
        folder=given.folder.expanduser().absolute(),
        memory_bytes=given.memory_mb << 20 if given.memory_mb is not None else None,
        cpus=given.cpus,
        nice=given.nice,
        pause_on_battery=given.pause_on_battery,
        pause_command=given.pause_command,
    )
    try:
        serve_until_signalled(settings, lambda: print(f"worker: {settings.socket}", flush=True))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
