"""`fedbraid bench kernels`: every family's rows, whatever becomes of the other families."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from simulations.benchmarks.kernels import collection, machine_floor
from simulations.benchmarks.kernels.machine_floor import MachineFloor
from simulations.benchmarks.kernels.row import Row
from simulations.benchmarks.kernels.timing import least_seconds, median_seconds
from simulations.command import main

FAST = Row("fast", "a primitive", 0.002, 0.01, "slow torch", 0.001, "one read", "≥ 4 ×", {"K": 3.0})
BARE = Row("bare", "another", 2.5)


def fail(quick: bool) -> list[Row]:
    raise RuntimeError("no such instruction")


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[bool], list[Row]]]:
    """What the command finds instead of the real families, which take minutes."""
    found: dict[str, Callable[[bool], list[Row]]] = {
        "bare": lambda quick: [BARE],
        "fast": lambda quick: [FAST] if quick else [FAST, FAST],
    }
    floor = MachineFloor("a processor", 2, "portable", 10.0, 20.0, 30.0, 40.0)
    monkeypatch.setattr(collection, "families", lambda: found)
    monkeypatch.setattr(machine_floor, "measure", lambda quick: floor)
    return found


def bench(*words: str) -> int:
    """The exit code of ``fedbraid bench kernels WORDS``."""
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "kernels", *words])
    return int(stopped.value.code or 0)


@pytest.mark.usefixtures("families")
def test_json_is_the_machine_and_then_a_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--json", "--quick") == 0
    machine, bare, fast = map(json.loads, capsys.readouterr().out.splitlines())
    assert machine["machine"]["backend"] == "portable"
    assert (bare["family"], bare["ratio"], bare["floor_share"]) == ("bare", None, None)
    assert fast["ratio"] == pytest.approx(5.0)
    assert fast["floor_share"] == pytest.approx(0.5)
    assert fast["extra"] == {"K": 3.0}


@pytest.mark.usefixtures("families")
def test_the_table_has_every_row_and_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--family", "fast") == 0
    shown = capsys.readouterr().out
    assert shown.count("a primitive") == 2
    assert all(part in shown for part in ("2 ms", "slow torch", "10 ms", "5 ×", "50%", "≥ 4 ×"))
    assert all(part in shown for part in ("a processor", "copy 10.0", "bf16 40"))
    assert "another" not in shown


def test_a_family_that_fails_costs_the_others_nothing(
    families: dict[str, Callable[[bool], list[Row]]], capsys: pytest.CaptureFixture[str]
) -> None:
    families["alas"] = fail
    assert bench("--quick") == 1
    shown = capsys.readouterr()
    assert "a primitive" in shown.out
    assert "no such instruction" in shown.err


@pytest.mark.usefixtures("families")
def test_an_unknown_family_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--family", "fats") == 2
    assert "fats" in capsys.readouterr().err


def test_every_module_with_rows_is_a_family() -> None:
    assert {"pruning", "stack_svd"} <= set(collection.families())
    assert "row" not in collection.families()


def test_every_call_is_made_once_more_than_it_is_timed() -> None:
    calls: list[str] = []
    for measure in (median_seconds, least_seconds):
        calls.clear()
        times = measure(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)
        assert "".join(calls) == "ab" * 4
        assert all(seconds >= 0 for seconds in times)
