"""The two engines of a simulation: in process, and Flower's own with Ray. Same apps, same numbers."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, Protocol

from fedclient.answers import answers_of
from fedclient.app import app as client_app
from fedclient.app import make_app as make_client_app
from fedclient.worker import Worker
from fedserver import events
from fedserver.app import make_app as make_server_app
from fedserver.configuration import ConfigurationError, RunConfiguration
from fedserver.exchange import Exchange
from fedserver.ledger import KEYS
from fedserver.live_log import LiveLog
from fedserver.rounds import Coordinator
from fedserver.telemetry import traced
from simulations.edges import edge_node
from simulations.faults import away, faulty
from simulations.local_grid import FIRST_NODE, LocalGrid, SimulatedClock, honest

QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class Engine(Protocol):
    """Runs a configuration into a run folder, telling ``emit`` what happens."""

    def __call__(
        self,
        configuration: RunConfiguration,
        folder: Path,
        emit: events.Listener,
        *,
        resume: bool = False,
    ) -> None: ...


def run_local(
    configuration: RunConfiguration, folder: Path, emit: events.Listener, *, resume: bool = False
) -> None:
    """Run all nodes in this process, one after another, with one shared base model."""
    names = [node.name for node in configuration.nodes]
    round_number = 0
    told = traced(LiveLog(folder, emit))

    def listen(event: events.Event) -> None:
        nonlocal round_number
        if isinstance(event, events.RoundStarted):
            round_number = event.round
        elif isinstance(event, events.RoundCommitted):
            round_number = 0
        told(event)

    def progress(node: str, step: int, steps: int, loss: float) -> None:
        told(events.NodeProgress(round_number, node, step, steps, loss))

    def started(node_id: int, message: object) -> None:
        if round_number and node_id - FIRST_NODE < len(names):
            told(events.NodeStarted(round_number, names[node_id - FIRST_NODE]))

    client = honest(make_client_app(answers_of(Worker(progress))))
    clock = SimulatedClock()
    answers = {
        index: away(node.away, faulty(node.fault or "", client, configuration.deadline_seconds))
        for index, node in enumerate(configuration.nodes)
    }
    keys = {
        index: folder / KEYS / "nodes" / f"{index}.pem"
        for index in range(len(answers) + len(configuration.edges))
        if configuration.signatures == "required"
    }
    for place, edge in enumerate(configuration.edges):
        behind = {names.index(name): answers.pop(names.index(name)) for name in edge.nodes}
        answers[len(names) + place] = edge_node(edge.name, behind, keys, started, told)
    exchange = Exchange(LocalGrid(answers, clock, on_start=started, keys=keys), clock)
    Coordinator(configuration, exchange, folder, emit=listen, resume=resume).run()


def run_flower(
    configuration: RunConfiguration, folder: Path, emit: events.Listener, *, resume: bool = False
) -> None:
    """Run under Flower's simulation engine: every node's work is done by a Ray actor."""
    if configuration.edges:
        raise ConfigurationError("edges are simulated by --engine local only")
    faults = [node.name for node in configuration.nodes if node.fault or node.away]
    if faults:
        raise ConfigurationError(f"node {faults[0]!r}: faults are simulated by --engine local only")
    if configuration.signatures == "required":
        # Flower's engine gives all simulated nodes one configuration, so they have no keys.
        raise ConfigurationError(
            "signatures = 'required': nodes have keys in --engine local and in deployments only"
        )
    os.environ.update(QUIET_FLOWER)
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "--engine flower needs Ray: pip install 'fedbraid[sim]', or use --engine local"
        ) from None
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    backend: Any = {
        # One actor holds one base model; its CPUs are the threads that the scenario fixes.
        "client_resources": {"num_cpus": configuration.threads, "num_gpus": 0.0},
        "init_args": {
            "num_cpus": max(configuration.threads, os.cpu_count() or 1),
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        },
    }
    with warnings.catch_warnings():
        # Flower 1.41 deprecates this entry for `flwr run`, which needs a SuperLink and its own home.
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=make_server_app(configuration, folder, emit=emit, resume=resume),
            client_app=client_app,
            num_supernodes=len(configuration.nodes),
            backend_config=backend,
        )


ENGINES: dict[str, Engine] = {"local": run_local, "flower": run_flower}
