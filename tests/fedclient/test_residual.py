"""What a node keeps between rounds: the round asked again finds what it found the first time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedclient import residual
from fedclient.residual import Residuals


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Residuals:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path))
    return Residuals("a-run", "ward 3/west")


def left(value: float) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((2, 3), value)}


def found(kept: Residuals, *names: str) -> tuple[float | None, str]:
    values, name = kept.find(names)
    return (float(values["layer.weight"][0, 0]) if values else None), name


def test_a_residual_is_found_by_its_name_alone(kept: Residuals) -> None:
    assert found(kept, "a") == (None, "")
    for place, name in enumerate("abc"):
        kept.keep(name, left(place))
    assert found(kept, "c", "b", "a") == (2.0, "c")
    assert found(kept, "b", "a") == (1.0, "b")
    assert found(kept, "missed", "a") == (0.0, "a")
    assert found(Residuals("a-run", "ward 3/west"), "c") == (2.0, "c")
    assert found(Residuals("a-run", "ward 4"), "c") == (None, "")
    assert found(Residuals("b-run", "ward 3/west"), "c") == (None, "")


def test_a_round_that_is_asked_again_finds_the_same(kept: Residuals) -> None:
    kept.keep("a", left(1))
    kept.keep("b", left(2))
    # The node was killed before its reply arrived, and the round of that name begins anew.
    assert found(kept, "a") == (1.0, "a")


def test_a_damaged_file_is_as_none(kept: Residuals, tmp_path: Path) -> None:
    kept.keep("a", left(1))
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"half a file")
    assert found(kept, "a") == (None, "")


@pytest.mark.parametrize(("room", "most"), [(0, 32), (1 << 30, 5)])
def test_the_oldest_go_but_not_what_a_run_goes_on_from(
    room: int, most: int, kept: Residuals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "ROOM", room)
    monkeypatch.setattr(residual, "MOST", most)
    for place in range(most):
        kept.keep(f"copy-{place}", left(place))
        assert len(list(tmp_path.rglob("*.safetensors"))) == min(place + 1, most if room else 2)
    oldest = sorted(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[0]
    assert found(kept, oldest.stem)[1] == oldest.stem
    kept.keep("next", left(9))
    assert found(kept, "next") == (9.0, "next")
    assert found(kept, oldest.stem)[1] == oldest.stem


WRITER = """
import itertools, torch
from fedclient.residual import Residuals
kept = Residuals("a-run", "node")
for number in itertools.count(1):
    kept.keep(str(number), {"weight": torch.full((700, 700), float(number % 100))})
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_residual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        written = [int(writer.stdout.readline()) for _ in range(5)]
        writer.kill()
    node = Residuals("a-run", "node")
    values, name = node.find([str(written[-1])])
    assert name
    assert float(values["weight"].unique()) == written[-1] % 100
    node.keep("after", left(1))
    assert not list(tmp_path.rglob("*.part"))


def test_a_sound_file_is_found_where_it_cannot_be_touched(
    kept: Residuals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder of another user's, or on a disk that is mounted to be read."""
    kept.keep("a", left(1))

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(residual.os, "utime", refuse)
    assert found(kept, "a") == (1.0, "a")
