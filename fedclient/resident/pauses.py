"""When a device should not work: on battery, or while a command says that its user is there."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fedclient.resident.settings import ResidentSettings

POWER = Path("/sys/class/power_supply")
COMMAND_SECONDS = 10.0


def paused(settings: ResidentSettings, power: Path = POWER) -> str:
    """Why the device should not work now; "" if it may."""
    if settings.pause_on_battery and on_battery(power):
        return "it runs on battery"
    if settings.pause_command is not None and _succeeds(settings.pause_command):
        return f"{settings.pause_command!r} exits with 0"
    return ""


def on_battery(power: Path = POWER) -> bool:
    """Whether a battery is being drained and no mains supply is on (Linux's power_supply class)."""
    supplies = [s for s in sorted(power.glob("*")) if _text(s / "scope") != "Device"]
    mains = [_text(s / "online") for s in supplies if _text(s / "type") in ("Mains", "USB")]
    if "1" in mains:
        return False
    batteries = [_text(s / "status") for s in supplies if _text(s / "type") == "Battery"]
    return "Discharging" in batteries


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _succeeds(command: str) -> bool:
    try:
        done = subprocess.run(
            command, shell=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
