"""Pictures of every view in two widths: ``make screenshots`` writes them to build/screenshots.

Small real runs of three families are made first: three that have finished, and one that is paused after
a roll-back, with nodes that are kept out. Three pictures are kept for the documentation, cut and reduced
to at most 120 kB each.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedserver import events
from fedserver.configuration import RunConfiguration
from fedserver.control import ControlQueue
from fedserver.dashboard.registry import VIEWS
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.invitation import invite
from simulations.benchmarks.dashboard_process import dashboard_process
from simulations.engines import run_local
from simulations.report import write_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PATIENCE = 300
"""Seconds until a small run has done four rounds, on a busy machine."""
WIDTHS = {1440: "light", 390: "dark"}
KEPT = {
    "live-1440": "dashboard-live.png",
    "compare-1440": "dashboard-compare.png",
    "live-390": "dashboard-phone.png",
}
LARGEST = 120_000


NODES = (
    {"name": "helpdesk", "description": "workstation", "lora_r": 8},
    {"name": "clinic", "description": "workstation"},
    {"name": "newsroom", "description": "laptop", "strand": "projected"},
    {"name": "school", "description": "laptop", "strand": "projected"},
    {"name": "reception", "description": "phone", "strand": "zeroth-order"},
    {"name": "cafe", "description": "phone", "strand": "zeroth-order", "fault": "late"},
)


def test_pictures(
    make_configuration: Callable[..., RunConfiguration],
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Make three runs of a tiny model, serve them, and take the pictures."""
    # A picture names the model, and no folder of the machine that it was taken on.
    monkeypatch.chdir(tiny_model_folder.parent)
    target = ROOT / "build" / "screenshots"
    target.mkdir(parents=True, exist_ok=True)
    deployment = ServerFolder(tmp_path / "server")
    deployment.prepare({})
    invite(deployment, "a new laptop", 24.0)
    runs = deployment.path / "runs"

    def asked(name: str, seed: int) -> RunConfiguration:
        return make_configuration(
            base_model=tiny_model_folder.name,
            name=name,
            seed=seed,
            rounds=8,
            nodes=NODES,
            local_steps=6,
            signatures="required",
            learning_rate=4e-3,
        )

    for seed in (7, 8, 9):
        name = f"mixed-seed{seed}"
        run_local(asked(name, seed), runs / name, lambda event: None)
        write_report(runs / name)
    with paused(asked("paused", 5), runs / "paused"):
        take(runs, target)
    for name, kept in KEPT.items():
        keep(target / f"{name}.png", ROOT / "docs" / "images" / kept)


@contextmanager
def paused(asked: RunConfiguration, folder: Path) -> Iterator[None]:
    """A run that operators have acted on and that waits meanwhile."""
    waits = threading.Event()

    def ask(action: str, **arguments: Any) -> None:
        ControlQueue(folder).ask(
            action, arguments, who="olga", role="operator", reason="to be looked at"
        )

    def act(event: events.Event) -> None:
        if event == events.RoundStarted(4):
            ask("rollback", round=2)
            ask("drain", node="school")
            ask("quarantine", node="cafe")
            ask("revoke", node="reception")
        elif event == events.RoundStarted(5):
            ask("pause")
        elif isinstance(event, events.PhaseStarted) and event.phase == "paused":
            waits.set()

    run = threading.Thread(target=run_local, args=(asked, folder, act), daemon=True)
    run.start()
    assert waits.wait(PATIENCE)
    yield
    ask("stop")
    ask("resume")
    run.join(PATIENCE)


def take(runs: Path, target: Path) -> None:
    """Pictures of all views of the first run, and of those over all runs."""
    tools = _browser()
    names = sorted(path.name for path in runs.glob("mixed-*"))
    here = f"/runs/{names[0]}"
    paths = {view.name or "live": f"{here}/{view.name}".rstrip("/") for view in VIEWS}
    query = "&".join(f"run={name}" for name in names)
    paths |= {"runs": "/", "round": f"{here}/rounds/2", "compare": f"/compare?{query}",
              "server": "/server", "start": "/start", "devices": "/devices", "access": "/access",
              "revoke": "/runs/paused/control?revoke=clinic"}  # fmt: skip
    for name in ("live", "fleet", "control"):
        paths[f"paused-{name}"] = f"/runs/paused/{name}".removesuffix("/live")
    with dashboard_process(runs) as (link, _), tools.browser() as browser:
        page = browser.new_page()
        page.goto(link)
        for width, scheme in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            for name, path in paths.items():
                page.goto(link.split("/login")[0] + path)
                page.wait_for_load_state("load")
                page.screenshot(path=target / f"{name}-{width}.png", full_page=True)
                print(target / f"{name}-{width}.png")


def keep(source: Path, target: Path) -> None:
    """Cut to the upper part, reduce to a palette, and halve until it is small."""
    from PIL import Image

    picture = Image.open(source).convert("RGB")
    picture = picture.crop((0, 0, picture.width, min(picture.height, round(picture.width * 2.1))))
    colours = 128
    while True:
        picture.quantize(colours).save(target, optimize=True)
        if target.stat().st_size <= LARGEST:
            return
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5))


def _browser() -> ModuleType:
    specification = importlib.util.spec_from_file_location("browser", HERE / "browser.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
