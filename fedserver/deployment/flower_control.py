"""Flower's control interface, spoken to on loopback: which nodes it knows, and runs.

The registry decides who is a node; Flower's own list is made to follow it, whatever was missed while
one of the two was down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from fedhost.ports import LOOPBACK
from fedserver.deployment.registry import Registry

# What a transport key's list entry says once its node was unregistered.
UNREGISTERED = "unregistered"
ONLINE = "online"
# Runs are listed newest first: one that is under way is among so many.
MOST_RUNS = 200


class DeploymentError(Exception):
    """A deployment's server, or Flower in it, did not do what was asked; the message says what to do."""


class Unreachable(DeploymentError):
    """The SuperLink does not answer now; it may be about to be started again."""


@dataclass(frozen=True)
class RunStatus:
    """How far Flower says that a run is: pending, starting, running, or finished with an outcome."""

    status: str
    outcome: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.status == "finished"

    @property
    def reason(self) -> str:
        """What the app said, without Flower's words around it; "" if it said nothing."""
        return " ".join(self.details.partition("with exception:")[2].split()) or self.details

    @property
    def explained(self) -> bool:
        """Whether the app itself said why it failed; a killed one says nothing."""
        return "with exception" in self.details


@dataclass(frozen=True)
class LiveRun:
    """A run of this server. ``settings``: what it was started with (``fedserver.app.deployed``).

    ``run_id``: Flower's; 0 for one that is to be started.
    """

    run_id: int
    settings: Mapping[str, str | bool]

    @property
    def folder(self) -> Path:
        """Where its ledger is."""
        return Path(str(self.settings["output"]))

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.name

    @property
    def scenario(self) -> str:
        """The scenario's file or name."""
        return str(self.settings["scenario"])

    @property
    def overrides(self) -> list[str]:
        """What was changed in the scenario."""
        return [one for one in str(self.settings["set"]).split(";") if one.strip()]


class FlowerControl:
    """Commands to the SuperLink on this host."""

    def __init__(self, port: int, authority: Path) -> None:
        self._port = port
        self._authority = authority

    def follow(self, registry: Registry) -> dict[str, int]:
        """Make Flower's nodes those of the registry; returns Flower's node id of each name."""
        enrolled = {node.transport_key: node for node in registry.nodes() if node.revoked is None}
        with self._connected() as client:
            known = {
                node.public_key.decode(): node.node_id
                for node in client.ListNodes(ListNodesRequest()).nodes_info
                if node.status != UNREGISTERED
            }
            for key in known.keys() - enrolled.keys():
                client.UnregisterNode(UnregisterNodeRequest(node_id=known[key]))
            for key in enrolled.keys() - known.keys():
                answer = client.RegisterNode(
                    RegisterNodeRequest(public_key=key.encode(), name=enrolled[key].name)
                )
                known[key] = answer.node_id
        return {node.name: known[key] for key, node in enrolled.items()}

    def start_run(self, bundle: bytes, settings: Mapping[str, str | bool]) -> int:
        """Start a run of an app bundle; returns Flower's run id."""
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto(dict(settings)),
        )
        with self._connected() as client:
            answer = client.StartRun(request)
        if not answer.HasField("run_id"):
            raise DeploymentError(f"Flower started no run: {answer.note or 'no reason given'}")
        return int(answer.run_id)

    def run_status(self, run_id: int) -> RunStatus:
        """How far a run is."""
        with self._connected() as client:
            found = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in found:
            raise DeploymentError(f"Flower knows no run {run_id}")
        status = found[run_id].status
        return RunStatus(status.status, status.sub_status, status.details)

    def live_runs(self) -> list[LiveRun]:
        """The runs of this server's app that have not ended, the newest first."""
        with self._connected() as client:
            found = client.ListRuns(ListRunsRequest(limit=MOST_RUNS)).run_dict
        under_way = [run for run in found.values() if run.status.status != "finished"]
        settings = {run.run_id: user_config_from_proto(run.override_config) for run in under_way}
        return [
            LiveRun(run_id, {k: v for k, v in own.items() if isinstance(v, str | bool)})
            for run_id, own in settings.items()
            if own.get("output")
        ]

    def stop_run(self, run_id: int) -> None:
        """Let Flower end a run; one that has ended meanwhile is well."""
        try:
            with self._connected() as client:
                client.StopRun(StopRunRequest(run_id=run_id))
        except DeploymentError:
            if not self.run_status(run_id).finished:
                raise

    def online(self) -> set[str]:
        """Names of the nodes that are connected now."""
        with self._connected() as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
        return {node.name for node in nodes if node.status == ONLINE}

    @contextmanager
    def _connected(self) -> Iterator[ControlHttpClient]:
        client = ControlHttpClient.from_server_address(
            f"{LOOPBACK}:{self._port}",
            insecure=False,
            root_certificates=self._authority.read_bytes(),
            interceptors=[
                CliClientHttpInterceptor(),
                RuntimeVersionHttpInterceptor(component_name="flwr CLI"),
            ],
        )
        try:
            yield client
        except httpx.HTTPStatusError as error:
            reason = error.response.text[:200]
            raise DeploymentError(
                f"Flower refused ({error.response.status_code}): {reason}"
            ) from None
        except httpx.TransportError as error:
            raise Unreachable(f"the SuperLink does not answer: {error}") from None
        finally:
            client.close()
