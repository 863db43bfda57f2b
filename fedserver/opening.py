"""How a run begins: its genesis entry, and who takes part."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path

from aggregators.methods import label
from fedserver import events
from fedserver.configuration import RunConfiguration
from fedserver.ledger import Ledger, LedgerError
from fedserver.planner import make_method
from fedserver.roster import Member, Roster


def begin(
    ledger: Ledger, roster: Roster, asked: RunConfiguration, configuration: RunConfiguration
) -> None:
    """Write the genesis entry, or check that the nodes still hold the run's base model.

    ``configuration``: what was ``asked`` for, with what the nodes' limits decide. Raises LedgerError.
    """
    genesis = ledger.last("genesis")
    if genesis is None:
        ledger.append(
            "genesis",
            0,
            {
                "run": asked.run_id(),
                "configuration": configuration.identity(),
                "base_model": configuration.base_model,
                "base_digest": roster.base_digest,
                "layout": roster.layout.fingerprint,
                "layout_blob": ledger.put(roster.layout_json.encode()),
            },
            {"started": time.time()},
        )
    elif genesis.content["configuration"] != configuration.identity():
        raise LedgerError(
            "the limits of the nodes' devices have changed, and with them what the nodes would be"
            " asked for: restore them, or start a new run"
        )
    elif genesis.content["base_digest"] != roster.base_digest:
        raise LedgerError(
            f"the run began with base model {genesis.content['base_digest'][:12]}, the nodes now"
            f" hold {roster.base_digest[:12]}: restore the first model, or start a new run"
        )


def run_started(
    configuration: RunConfiguration,
    roster: Roster,
    folder: Path,
    first_round: int,
    baselines: tuple[int, int],
    real_time: bool,
) -> events.RunStarted:
    """The run as it begins or goes on. ``baselines``: bytes of the model a node, of LoRA a rank."""
    return events.RunStarted(
        name=configuration.name,
        preset=configuration.preset,
        rounds=configuration.rounds,
        first_round=first_round,
        nodes=tuple(_node_info(configuration, member, roster) for member in roster.members),
        base_model=configuration.base_model,
        output=str(folder),
        model_bytes_a_node=baselines[0],
        lora_bytes_a_rank=baselines[1],
        real_time=real_time,
        seed=configuration.seed,
    )


def missing(
    configuration: RunConfiguration, roster: Roster, revoked: Collection[str]
) -> Iterator[str]:
    """What to say of the scenario's nodes that are not there."""
    here = {name for member in roster.members for name in member.names}
    for node in configuration.nodes:
        if node.name in here:
            continue
        if node.name in revoked:
            yield f"{node.name} is missing: it has been revoked"
        else:
            yield f"{node.name} is missing, and takes part from the round after it connects"


def _node_info(configuration: RunConfiguration, member: Member, roster: Roster) -> events.NodeInfo:
    node = configuration.node(member.capabilities.node)
    method = make_method(configuration, member.capabilities, round_number=1, layout=roster.layout)
    sends = label(method, configuration.base_format_of(member.capabilities.node))
    if member.capabilities.devices:
        sends = f"sum of {len(member.capabilities.devices)}"
    categories = ", ".join(node.categories or ()) if node else ""
    return events.NodeInfo(
        node=member.capabilities.node,
        sends=sends,
        examples=member.capabilities.examples,
        held_out=member.capabilities.held_out,
        description=(node.description if node else "") or categories,
        device=member.capabilities.device,
        threads=member.capabilities.threads,
        memory_bytes=member.capabilities.memory_bytes,
        accelerator_memory_bytes=member.capabilities.accelerator_memory_bytes,
        version=", ".join(f"{k} {v}" for k, v in member.capabilities.versions.items()),
    )
