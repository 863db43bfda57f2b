"""On battery, or while a command succeeds, a device may be told not to work."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedclient.resident.pauses import on_battery, paused
from fedclient.resident.settings import ResidentSettings, SettingsError


def supplies(folder: Path, **devices: dict[str, str]) -> Path:
    for name, values in devices.items():
        (folder / name).mkdir()
        for key, value in values.items():
            (folder / name / key).write_text(value + "\n")
    return folder


DRAINED = {"type": "Battery", "status": "Discharging"}


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ({}, False),
        ({"BAT0": DRAINED}, True),
        ({"BAT0": DRAINED, "AC": {"type": "Mains", "online": "0"}}, True),
        ({"BAT0": DRAINED, "AC": {"type": "Mains", "online": "1"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Full"}}, False),
        # A mouse's battery is not the computer's.
        ({"hid": DRAINED | {"scope": "Device"}}, False),
    ],
)
def test_battery(devices: dict[str, dict[str, str]], expected: bool, tmp_path: Path) -> None:
    power = supplies(tmp_path, **devices)
    assert on_battery(power) == expected
    told = paused(ResidentSettings(tmp_path, pause_on_battery=True), power)
    assert bool(told) == expected
    assert paused(ResidentSettings(tmp_path), power) == ""


def test_a_command_decides(tmp_path: Path) -> None:
    at_work = tmp_path / "at-work"
    settings = ResidentSettings(tmp_path, pause_command=f"test -e {at_work}")
    assert paused(settings) == ""
    at_work.touch()
    assert str(at_work) in paused(settings)


@pytest.mark.parametrize(
    "wrong",
    [{"memory_bytes": 1}, {"cpus": 0}, {"nice": 20}, {"folder": Path("/" + "x" * 120)}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        ResidentSettings(**{"folder": tmp_path, **wrong}).check()  # type: ignore[arg-type]
