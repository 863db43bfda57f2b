"""The repository is a Flower App: what `flwr run .` would bundle is valid and whole."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

ROOT = Path(__file__).resolve().parents[2]


def test_the_bundle_holds_what_nodes_and_server_import_and_nothing_else():
    config, warnings = load_and_validate(ROOT / "pyproject.toml")
    assert warnings == []
    names = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))).namelist())
    rooms = {
        path.relative_to(ROOT).as_posix()
        for room in ("aggregators", "fedclient", "fedserver")
        for path in (ROOT / room).rglob("*.py")
    }
    scenario = f"simulations/scenarios/{config['tool']['flwr']['app']['config']['scenario']}.toml"
    assert rooms | {scenario, "pyproject.toml", "LICENSE"} <= names
    assert not any(name.startswith(("tests/", "runs/", ".venv/")) for name in names)
