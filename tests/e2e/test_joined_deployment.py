"""Two devices join by token and train over TLS through nginx; the result is the simulation's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tomli_w
from flwr.cli.build import build_fab_from_files

from fedhost.ports import LOOPBACK, free_ports
from fedhost.supervision import status_of, stop
from fedserver.configuration import load
from fedserver.deployment.flower_control import FlowerControl
from fedserver.deployment.folder import ServerFolder
from fedserver.ledger import Ledger
from simulations.run import ledger_head, simulate

ROUNDS = 5
NODES = ("clinic", "phone")
PATIENCE_SECONDS = 240.0
SCENARIO = """
name = "joined"
preset = "mixed"
base_model = "{model}"
rounds = {rounds}
seed = 3
signatures = "required"
threads = 1
local_steps = 2
max_length = 48
lora_r = 3
view_rank = 6
micro_batch_size = 4
deadline_seconds = 120.0

[data]
source = "{data}"
held_out_max = 3
limit_per_node = 16

[zeroth_order]
learning_rate = 1e-3
pool_size = 64
local_steps = 3

[[nodes]]
name = "clinic"

[[nodes]]
name = "phone"
strand = "zeroth-order"
"""
# What a server that was taken over might send: code of its own for the devices.
FOREIGN = """
import pathlib
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()

@client.query()
def query(message, context):
    pathlib.Path("{proof}").touch()
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    messages = [Message(RecordDict(), node, "query", ttl=60.0) for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages, timeout=60.0))
    told = [reply.error.reason if reply.has_error() else "obeyed" for reply in replies]
    pathlib.Path("{replies}").write_text("\\n".join(told))
"""

Run = Callable[..., str]


@pytest.fixture
def fedbraid(tmp_path: Path) -> Iterator[Run]:
    """The command, with a cache of this test's own: residuals are kept by run and node."""
    environment = os.environ | {"FEDBRAID_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "simulations.command", *map(str, words)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        logs = "".join(p.read_text()[-3000:] for p in tmp_path.glob("*/logs/*.log"))
        assert done.returncode == 0, done.stderr + logs
        return done.stdout

    yield run
    for folder in ("clinic", "phone", "server"):
        stop(tmp_path / folder)


def test_devices_join_train_and_are_shut_out(
    fedbraid: Run, tmp_path: Path, tiny_model_folder: Path, tiny_data_file: Path
) -> None:
    scenario = tmp_path / "joined.toml"
    scenario.write_text(
        SCENARIO.format(model=tiny_model_folder, data=tiny_data_file, rounds=ROUNDS)
    )
    server = tmp_path / "server"
    fedbraid("server", "up", server, "--listen", f"{LOOPBACK}:{free_ports(1)[0]}")
    for partition, name in enumerate(NODES):
        words = fedbraid("server", "invite", server, name).split()
        assert words[:3] == ["fedbraid", "client", "join"]
        fedbraid(*words[1:], "--folder", tmp_path / name, "--partition", partition)
        fedbraid("client", "run", "--background", "--folder", tmp_path / name)
        fedbraid("client", "status", "--folder", tmp_path / name)

    assert (
        _foreign_replies(ServerFolder(server), tmp_path) == ["The FAB could not be verified."] * 2
    )
    assert not (tmp_path / "proof").exists()

    with ThreadPoolExecutor(1) as other:
        run = other.submit(fedbraid, "server", "run", server, scenario)
        # In the midst of the run its SuperLink is killed, and started again.
        _until(lambda: (server / "runs" / "joined" / "ledger.db").exists() or run.done())
        _kill(server, "superlink")
        told = run.result()
    simulate(load(str(scenario), []), tmp_path / "simulated", lambda event: None, samples=0)
    head = ledger_head(tmp_path / "simulated")
    deployed, simulated = server / "runs" / "joined", tmp_path / "simulated"
    assert re.search(rf"ledger head {head}", told), told + _unlike(deployed, simulated)
    fedbraid("ledger", "verify", server / "runs" / "joined")
    ledger = Ledger(server / "runs" / "joined")
    measured = [entry.wall["memory"] for entry in ledger.entries("round")]
    ledger.close()
    # The resident workers measure what training takes, as a simulation does.
    assert all(one[name]["resident"] > 100 << 20 for one in measured for name in NODES)

    # Shut out, a node ends by itself; the other one stays.
    fedbraid("server", "revoke", server, "phone")
    _until(lambda: status_of(tmp_path / "phone") is None)
    fedbraid("client", "status", "--folder", tmp_path / "clinic")
    nodes = json.loads(fedbraid("server", "status", server, "--json"))["nodes"]
    assert {node["name"]: bool(node["revoked"]) for node in nodes} == {
        "clinic": False,
        "phone": True,
    }
    fedbraid("client", "leave", "--folder", tmp_path / "clinic")
    fedbraid("server", "down", server)
    assert status_of(server) is None


def _foreign_replies(server: ServerFolder, folder: Path) -> list[str]:
    """Start a foreign app on the server; what the devices answered to it."""
    project = {
        "project": {"name": "foreign", "version": "1.0.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "foreign",
                    "components": {
                        "serverapp": "foreign_app:server",
                        "clientapp": "foreign_app:client",
                    },
                }
            }
        },
    }
    code = FOREIGN.format(proof=folder / "proof", replies=folder / "replies")
    content, _ = build_fab_from_files(
        {"pyproject.toml": tomli_w.dumps(project).encode(), "foreign_app.py": code.encode()}
    )
    control = FlowerControl(server.ports().superlink, server.loopback_identity.authority)
    run = control.start_run(content, {})
    _until(lambda: control.run_status(run).finished)
    assert control.run_status(run).outcome == "completed", control.run_status(run)
    return (folder / "replies").read_text().splitlines()


def _unlike(*folders: Path) -> str:
    """What the rounds of the runs' ledgers say of the nodes, and the deployed run's log."""
    told = []
    for folder in folders:
        ledger = Ledger(folder)
        for entry in ledger.entries():
            nodes = entry.content.get("nodes", [])
            rows = [(row["node"], row["verdict"], row["reason"], row["update"]) for row in nodes]
            told.append(f"{entry.kind} {entry.round} {entry.content.get('state')} {rows}")
        ledger.close()
    log = folders[0] / "events.jsonl"
    return "\n".join(told) + (log.read_text()[-6000:] if log.exists() else "")


def _kill(folder: Path, name: str) -> None:
    told = status_of(folder)
    assert told is not None
    os.kill(told["children"][name]["pid"], signal.SIGKILL)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.25)
