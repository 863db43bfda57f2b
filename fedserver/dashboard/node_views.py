"""Views of the nodes: the fleet, what each was asked and why, privacy, and robustness."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fedserver.control import EXCLUDING
from fedserver.dashboard.page import Page, Question, page_of
from fedserver.dashboard.round_views import header, size_of, words
from fedserver.dashboard.run_reader import ROUNDS_OF_NODES, Row, RunReader
from fedserver.dashboard.tables import Column, make_table

FLEET = (
    Column("node", "Node"),
    Column("status", "State", "state"),
    Column("last_round", "Last accepted in round", "count"),
    Column("last_seen", "Last seen", "time"),
    Column("device_class", "Device class"),
    Column("strand", "Strand"),
    Column("device", "Processor"),
    Column("threads", "Threads", "count"),
    Column("memory_bytes", "Memory", "bytes"),
    Column("model_memory_bytes", "Needed for the plan", "bytes"),
    Column("link_mbps", "Link (Mbit/s)", "number"),
    Column("battery", "Battery", "share"),
    Column("examples", "Examples", "count"),
    Column("held_out", "Held out", "count"),
    Column("version", "Version"),
)
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
    Column("of", "of", "count"),
    Column("examples", "Examples", "count"),
    Column("share", "Share of the last round", "share"),
)
INFLUENCE = (
    Column("node", "Node"),
    Column("standing", "Standing", "state"),
    Column("share", "Influence on the last round", "bar"),
    Column("norm", "Norm of its update", "number"),
    Column("norm_ratio", "Norm against its family's median", "number"),
    Column("distance", "Distance", "number"),
    Column("accepted", "Accepted", "count"),
    Column("refused", "Refused", "count"),
    Column("reason", "Last reason"),
)


def fleet(run: RunReader, question: Question) -> Page:
    """The devices: what they say of themselves, and when they were last heard."""
    activity, recent = run.activity(), run.recent_nodes()
    configured = {node["name"]: node for node in run.configuration().get("nodes", ())}
    standing = standings(run)
    times = {entry["round"]: entry["time"] for entry in run.entries() if entry["kind"] == "round"}
    names = {**activity.members, **configured, **{n["node"]: n for r in recent.values() for n in r}}
    latest, heard = _latest(recent), _heard(recent)
    live = run.live().get("state") in ("running", "paused")
    rows = []
    for name in sorted(names):
        told, asked = activity.members.get(name, {}), configured.get(name, {})
        number, part = latest.get(name, (None, {}))
        current = activity.nodes.get(name, {}) if live else {}
        status = standing.get(name) or current.get("status") or part.get("verdict") or "silent"
        rows.append(
            {
                "node": name,
                "status": status,
                "last_round": number,
                "last_seen": current.get("answered")
                or current.get("since")
                or times.get(heard.get(name)),
                "device_class": told.get("description") or asked.get("description") or None,
                "strand": words(asked.get("strand")) or words(part.get("family")) or None,
                "device": told.get("device") or None,
                "threads": told.get("threads"),
                "memory_bytes": told.get("memory_bytes"),
                "model_memory_bytes": part.get("memory_bytes"),
                "link_mbps": told.get("link_mbps", asked.get("link_mbps")),
                "battery": told.get("battery"),
                "examples": told.get("examples"),
                "held_out": told.get("held_out"),
                "version": told.get("version") or None,
            }
        )
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    untold = [
        column.title.partition(" (")[0].lower()
        for column in FLEET
        if column.key in ("link_mbps", "battery", "memory_bytes", "device")
        and all(row[column.key] is None for row in rows)
    ]
    data = {**header(run), "counts": counts, "untold": untold, "rounds_read": ROUNDS_OF_NODES}
    shown = [c for c in FLEET if c.key == "node" or any(row[c.key] is not None for row in rows)]
    return page_of(
        data,
        make_table(
            "fleet", "Nodes", shown, rows, question.choice, empty="No node has been met yet."
        ),
    )


def plan(run: RunReader, question: Question) -> Page:
    """What each node was asked in the last round, and which line of the scenario decided it."""
    rounds = run.rounds()
    entry = run.entry("round", rounds[-1]["round"]) if rounds else None
    configuration = run.configuration()
    configured = {node["name"]: node for node in configuration.get("nodes", ())}
    rows = []
    for node in (entry["content"]["nodes"] if entry else ()):  # fmt: skip
        asked = node.get("plan") or {}
        method = asked.get("method") or {}
        rows.append(
            {
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
        )
    data = {**header(run), "shown": entry["round"] if entry else None}
    return page_of(
        data,
        make_table(
            "plan",
            "Plans",
            PLAN,
            rows,
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
    counted: dict[str, Row] = {}
    for number in sorted(recent):
        for node in recent[number]:
            row = counted.setdefault(
                node["node"],
                {"node": node["node"], "rounds": 0, "of": 0, "examples": None, "share": None},
            )
            row["of"] += 1
            if node["verdict"] == "accepted":
                row["rounds"] += 1
                row["examples"] = node["examples"]
            row["share"] = node["weight"] if number == latest.get("round") else row["share"]
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
    """How much each node moved the last aggregate, and who stands outside."""
    recent, standing = run.recent_nodes(), standings(run)
    rule = run.configuration().get("robust") or run.configuration().get("robustness")
    last = recent.get(max(recent), []) if recent else []
    middle = _family_medians(last)
    rows: dict[str, Row] = {}
    for number in sorted(recent):
        for node in recent[number]:
            row = rows.setdefault(
                node["node"], {"node": node["node"], "accepted": 0, "refused": 0, "reason": None}
            )
            row["accepted" if node["verdict"] == "accepted" else "refused"] += 1
            row["reason"] = node["reason"] or row["reason"]
    for node in last:
        norm, median = node.get("norm"), middle.get(node.get("family", ""))
        rows[node["node"]] |= {
            "share": node.get("weight"),
            "norm": norm,
            "norm_ratio": norm / median if norm is not None and median else None,
            "distance": node.get("distance"),
        }
    for name, row in rows.items():
        row["standing"] = standing.get(name, "member")
    data = {
        **header(run),
        "rule": rule,
        "quarantined": sorted(n for n, word in standing.items() if word == "quarantined"),
        "measured": any(row.get("distance") is not None for row in rows.values()),
        "rounds_counted": len(recent),
        "last_round": max(recent) if recent else None,
    }
    shown = [c for c in INFLUENCE if c.key != "distance" or data["measured"]]
    return page_of(
        data,
        make_table(
            "influence", "Influence", shown, [rows[n] for n in sorted(rows)], question.choice
        ),
    )


def standings(run: RunReader) -> dict[str, str]:
    """Nodes that an operator's recorded action keeps out, and how."""
    found: dict[str, str] = {}
    for entry in run.operator_entries():
        action = entry["content"].get("action")
        node = str((entry["content"].get("arguments") or {}).get("node"))
        if action in EXCLUDING:
            found[node] = EXCLUDING[action]
        elif action == "readmit":
            found.pop(node, None)
    return found


def _latest(recent: dict[int, list[Row]]) -> dict[str, tuple[int | None, Row]]:
    """By node: the last round in which it was accepted (None: in none), and its newest row."""
    found: dict[str, tuple[int | None, Row]] = {}
    for number in sorted(recent):
        for node in recent[number]:
            before = found.get(node["node"], (None, {}))[0]
            accepted = node["verdict"] == "accepted"
            if node["verdict"] != "late" or node["node"] not in found:
                found[node["node"]] = (number if accepted else before, node)
    return found


def _heard(recent: dict[int, list[Row]]) -> dict[str, int]:
    """By node: the last round in which anything came from it."""
    return {
        node["node"]: number
        for number in sorted(recent)
        for node in recent[number]
        if node["verdict"] != "missing"
    }


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
