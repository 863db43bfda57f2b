"""Views of the nodes: the fleet, what each was asked and why, privacy, and robustness."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedserver.dashboard.page import Page, Question, page_of
from fedserver.dashboard.round_views import family_share, family_sums, header, size_of, words
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.run_reader import ROUNDS_OF_NODES, Past, RunReader
from fedserver.dashboard.standings import standings
from fedserver.dashboard.tables import Column, LazyRows, make_table
from fedserver.live_log import ALIVE

FLEET = (
    Column("node", "Node"),
    Column("status", "State", "state"),
    Column("last_round", "Last accepted in round", "count"),
    Column("last_seen", "Last seen", "time"),
    Column("device_class", "Device class"),
    Column("strand", "Strand"),
    Column("device", "Processor"),
    Column("threads", "Threads", "count"),
    Column("memory_bytes", "RAM", "bytes"),
    Column("accelerator_memory_bytes", "VRAM", "bytes"),
    Column("model_memory_bytes", "Needed for the plan", "bytes"),
    Column("link_mbps", "Link (Mbit/s)", "number"),
    Column("battery", "Battery", "share"),
    Column("examples", "Examples", "count"),
    Column("held_out", "Held out", "count"),
    Column("version", "Version"),
)
TOLD = {
    "device_class", "device", "threads", "memory_bytes", "link_mbps", "battery", "examples", "held_out",
    "version",
}  # fmt: skip
"""Columns of what nodes say of themselves, or a scenario of them; one that nobody says is left out."""
MISSED = {"link_mbps", "battery", "memory_bytes", "device"}
"""Those of them that the page names where they are missing."""
PLAN = (
    Column("node", "Node"),
    Column("family", "Family"),
    Column("size", "Rank or K", "count"),
    Column("steps", "Steps", "count"),
    Column("batch", "Batch", "count"),
    Column("learning_rate", "Learning rate", "number"),
    Column("dtype", "Base held in"),
    Column("wire_dtype", "Sent as"),
    Column("targets", "Trains"),
    Column("deadline_seconds", "Deadline", "seconds"),
    Column("why", "Why"),
)
PARTICIPATION = (
    Column("node", "Node"),
    Column("rounds", "Rounds accepted", "count"),
    Column("of", "Rounds asked", "count"),
    Column("examples", "Examples", "count"),
    Column("share", "Share of its family, last round", "share"),
)
INFLUENCE = (
    Column("node", "Node"),
    Column("standing", "Standing", "state"),
    Column("family", "Family"),
    Column("share", "Share of its family's mean", "bar"),
    Column("norm", "Norm of its update", "number"),
    Column("norm_ratio", "Norm against its family's median", "number"),
    Column("accepted", "Accepted", "count"),
    Column("refused", "Refused", "count"),
    Column("reason", "Last reason"),
)

MEASURED = (
    Column("distance", "Distance", "number"),
    Column("over_median", "Distance against its family's median", "number"),
    Column("cosine", "Cosine to the others", "number"),
)
"""What a measurement adds to them, with the round that it is of."""
MOST_OFFERED = 500
"""So many of the last rounds are offered to be measured."""


def fleet(run: RunReader, question: Question) -> Page:
    """The devices: what they say of themselves, and when they were last heard."""
    activity = run.activity()
    configured = {node["name"]: node for node in run.configuration().get("nodes", ())}
    standing = standings(run)
    past = _past(run, standing)
    times = run.round_times({one.heard for one in past.values() if one.heard is not None})
    members, none = activity.members, Past()
    live = activity.nodes if run.live().get("state") in ALIVE else {}

    def status(name: str) -> str:
        return str(
            standing.get(name)
            or live.get(name, {}).get("status")
            or past.get(name, none).row.get("verdict")
            or "silent"
        )

    def row(name: str) -> Row:
        told, asked, before = members.get(name, {}), configured.get(name, {}), past.get(name, none)
        current = live.get(name, {})
        return {
            "node": name,
            "status": status(name),
            "last_round": before.accepted,
            "last_seen": current.get("answered")
            or current.get("since")
            or (times.get(before.heard) if before.heard else None),
            "device_class": told.get("description") or asked.get("description") or None,
            "strand": words(asked.get("strand")) or words(before.row.get("family")) or None,
            "device": told.get("device") or None,
            "threads": told.get("threads"),
            "memory_bytes": told.get("memory_bytes"),
            "accelerator_memory_bytes": told.get("accelerator_memory_bytes"),
            "model_memory_bytes": before.row.get("memory_bytes"),
            "link_mbps": told.get("link_mbps", asked.get("link_mbps")),
            "battery": told.get("battery"),
            "examples": told.get("examples"),
            "held_out": told.get("held_out"),
            "version": told.get("version") or None,
        }

    names = sorted({*members, *configured, *past})
    counts = Counter(map(status, names))
    untold = [c for c in FLEET if c.key in TOLD and not _anybody_says(c.key, members, configured)]
    data = {
        **header(run),
        "counts": dict(counts),
        "untold": [
            column.title if column.title.isupper() else column.title.partition(" (")[0].lower()
            for column in untold
            if column.key in MISSED
        ],
        "rounds_read": ROUNDS_OF_NODES,
    }
    return page_of(
        data,
        make_table(
            "fleet",
            "Nodes",
            [column for column in FLEET if column not in untold],
            LazyRows(names, row),
            question.choice,
            empty="No node has been met yet.",
        ),
    )


def plan(run: RunReader, question: Question) -> Page:
    """What each node was asked in the last round, and which line of the scenario decided it."""
    rounds = run.rounds()
    shown = rounds[-1]["round"] if rounds else None
    configuration = run.configuration()
    configured = {node["name"]: node for node in configuration.get("nodes", ())}

    def row(node: Row) -> Row:
        asked = node.get("plan") or {}
        method = asked.get("method") or {}
        return {
            "node": node["node"],
            "family": words(method.get("family")),
            "size": size_of(method),
            "steps": asked.get("local_steps"),
            "batch": asked.get("batch_size"),
            "learning_rate": asked.get("learning_rate"),
            "dtype": asked.get("dtype"),
            "wire_dtype": asked.get("wire_dtype"),
            "targets": ", ".join(method.get("target_modules") or ()) or "all weights",
            "deadline_seconds": asked.get("deadline_seconds"),
            "why": why(configuration, configured.get(node["node"], {}), asked),
        }

    # A late answer stands in the round in which it came, with the plan of its own.
    nodes = run.round_nodes(shown) if shown is not None else ()
    asked_now = [place for place, node in enumerate(nodes) if node["round"] == shown]
    data = {**header(run), "shown": shown}
    return page_of(
        data,
        make_table(
            "plan",
            "Plans",
            PLAN,
            LazyRows(asked_now, lambda place: row(nodes[place])),
            question.choice,
            empty="No round was planned and committed.",
        ),
    )


def why(configuration: Row, node: Row, asked: Row) -> str:
    """Where the parts of a plan come from: the preset, the node's own lines, its limits."""
    method = asked.get("method") or {}
    preset = configuration.get("preset")
    strand = node.get("strand")
    parts = [f"strand {strand} in the node's entry" if strand else f"strand by preset {preset}"]
    rank = method.get("rank") if method.get("family") == "low_rank" else None
    if rank is not None:
        wanted = node.get("lora_r") or configuration.get("lora_r") or rank
        source = "the node's lora_r" if node.get("lora_r") else "the run's lora_r"
        parts.append(
            f"rank {rank} by {source}"
            if rank == wanted
            else f"rank {rank}, the node's limit, below {wanted} by {source}"
        )
    own = [key for key in ("local_steps", "micro_batch_size", "learning_rate") if node.get(key)]
    if own:
        parts.append(", ".join(own).replace("_", " ") + " of its own")
    if not node.get("trains", True):
        parts.append("it only evaluates")
    return "; ".join(parts)


def privacy(run: RunReader, question: Question) -> Page:
    """ε spent, where the run accounts for it, and how often each node took part."""
    rounds = run.rounds()
    spent = [(row["round"], row["epsilon"]) for row in rounds if row.get("epsilon") is not None]
    settings = run.configuration().get("privacy")
    latest, recent = rounds[-1] if rounds else {}, run.recent_nodes()
    sums = _sums(recent.get(latest.get("round", 0), ()))
    counted: dict[str, Row] = {}
    for number in sorted(recent):
        for node in recent[number]:
            row = counted.setdefault(
                node["node"],
                {"node": node["node"], "rounds": 0, "of": 0, "examples": None, "share": None},
            )
            # Who answers late was asked in an earlier round, and is counted there.
            row["of"] += not _late(node)
            if node["verdict"] == "accepted":
                row["rounds"] += 1
                row["examples"] = node["examples"]
            if number == latest.get("round"):
                row["share"] = family_share(node["family"], node["weight"], sums)
    data = {
        **header(run),
        "accounted": bool(spent),
        "settings": settings if isinstance(settings, dict) else None,
        "epsilon": spent[-1][1] if spent else None,
        "epsilon_next": _next_epsilon(spent),
        "epsilon_cap": (settings or {}).get("epsilon") if isinstance(settings, dict) else None,
        "spent": {"round": [r for r, _ in spent], "epsilon": [e for _, e in spent]},
        "rounds_counted": len(recent),
    }
    return page_of(
        data,
        make_table(
            "participation",
            f"Participation, last {len(recent)} rounds" if recent else "Participation",
            PARTICIPATION,
            [counted[name] for name in sorted(counted)],
            question.choice,
        ),
    )


def robustness(run: RunReader, question: Question) -> Page:
    """How much each node moved its family's part of the last aggregate, and who stands outside."""
    recent, standing = run.recent_nodes(), standings(run)
    rule = run.configuration().get("robust") or run.configuration().get("robustness")
    last = recent.get(max(recent), []) if recent else []
    middle, sums = _family_medians(last), _sums(last)
    rows: dict[str, Row] = {}

    def row_of(name: str) -> Row:
        return rows.setdefault(name, {"node": name, "accepted": 0, "refused": 0, "reason": None})

    for number in sorted(recent):
        for node in recent[number]:
            row = row_of(node["node"])
            if node["verdict"] == "accepted" or not _late(node):
                row["accepted" if node["verdict"] == "accepted" else "refused"] += 1
            row["reason"] = node["reason"] or row["reason"]
    for node in last:
        norm, median = node.get("norm"), middle.get(node.get("family", ""))
        rows[node["node"]] |= {
            "family": words(node.get("family")),
            "share": family_share(node.get("family", ""), node.get("weight"), sums),
            "norm": norm,
            "norm_ratio": norm / median if norm is not None and median else None,
        }
    parts: list[Row] = []
    told = question.measured or {"state": "not asked", "round": None, "rows": ()}
    for one in told["rows"]:
        row, family = row_of(one["node"]), words(one["family"])
        row["family"] = row.get("family") or family
        if row["family"] != family or "distance" in row:
            # Of a node that trains in two ways, and of an edge, there are several.
            row = {"node": one["node"], "family": family}
            parts.append(row)
        row |= {column.key: one[column.key] for column in MEASURED}
    shown = [*rows.values(), *parts]
    for row in shown:
        row["standing"] = standing.get(row["node"], "member")
    data = {
        **header(run),
        "rule": rule,
        "quarantined": sorted(n for n, word in standing.items() if word == "quarantined"),
        "measurement": {key: value for key, value in told.items() if key != "rows"},
        "rounds_recorded": [e["round"] for e in run.entries() if e["kind"] == "round"][
            :MOST_OFFERED
        ],
        "rounds_counted": len(recent),
        "last_round": max(recent) if recent else None,
    }
    columns = list(INFLUENCE)
    if told["state"] == "finished":
        place = columns.index(next(c for c in INFLUENCE if c.key == "accepted"))
        columns[place:place] = [
            replace(c, title=f"{c.title}, round {told['round']}") for c in MEASURED
        ]
    return page_of(
        data,
        make_table(
            "influence",
            "Influence, by family",
            columns,
            sorted(shown, key=lambda row: (row.get("family") or "\uffff", row["node"])),
            question.choice,
        ),
    )


def _past(run: RunReader, out: Collection[str]) -> dict[str, Past]:
    """Of the last rounds; of nodes that are kept ``out`` of them, from before."""
    recent = run.recent_nodes()
    found: dict[str, Past] = {}
    for number in sorted(recent, reverse=True):
        for node in recent[number]:
            found.setdefault(node["node"], Past()).take_older(number, node)
    gone = [name for name in out if found.get(name, Past()).accepted is None]
    return found | run.past(gone)


def _late(node: Row) -> bool:
    """Whether a row is an answer to an earlier round's question."""
    return bool(node.get("staleness"))


def _anybody_says(key: str, *sources: Mapping[str, Row]) -> bool:
    key = "description" if key == "device_class" else key
    return any(row.get(key) not in (None, "") for rows in sources for row in rows.values())


def _sums(nodes: Sequence[Row]) -> dict[str, float]:
    return family_sums((node.get("family", ""), node.get("weight")) for node in nodes)


def _family_medians(nodes: Sequence[Row]) -> dict[str, float]:
    by_family: dict[str, list[float]] = {}
    for node in nodes:
        if node.get("norm") is not None and node["verdict"] == "accepted":
            by_family.setdefault(node.get("family", ""), []).append(node["norm"])
    return {family: statistics.median(norms) for family, norms in by_family.items()}


def _next_epsilon(spent: Sequence[tuple[int, Any]]) -> float | None:
    """ε if one more round runs: the last round's increase once more. Accountants are concave in T, so
    this is not below the true value."""
    if not spent:
        return None
    before = spent[-2][1] if len(spent) > 1 else 0.0
    return float(spent[-1][1] + (spent[-1][1] - before))
