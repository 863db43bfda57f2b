"""A server's folder that a broken disk has damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedserver.deployment.folder import FolderError, ServerFolder


@pytest.mark.parametrize(
    "damaged", [b"", b'{"superlink": 1', b"[1]", b"\xff", b'{"superlink": 1}', b"null"]
)
def test_damaged_ports_are_told_in_a_line_and_chosen_anew(damaged: bytes, tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path)
    folder.flower.mkdir()
    chosen = folder.choose_ports()
    assert folder.ports() == chosen
    (tmp_path / "ports.json").write_bytes(damaged)
    with pytest.raises(FolderError, match="server up"):
        folder.ports()
    assert folder.choose_ports() == folder.ports()
