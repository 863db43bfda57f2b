"""Views of a run's progress: live, all rounds, one round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedserver.control import EXCLUDING
from fedserver.dashboard.page import NotThere, Page, Question, page_of, run_address
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.standings import arrivals, counts, rollbacks
from fedserver.dashboard.tables import Column, LazyRows, make_table
from fedserver.live_log import ALIVE

PHASES = ("plan", "train", "aggregate", "commit")
PACE_ROUNDS = 5
MOVED = ("bytes_up", "bytes_down", "seconds")
ORDER_OF_STATUS = {
    "working": 0,
    "waiting": 2,
    "accepted": 3,
    **dict.fromkeys(EXCLUDING.values(), 4),
}
LIVE_NODES = 60

ARRIVALS = (
    Column("node", "Node"),
    Column("sends", "Sends"),
    Column("status", "State", "state"),
    Column("step", "Step", "count"),
    Column("steps", "Steps", "count"),
    Column("loss", "Training loss", "loss"),
    Column("bytes_up", "Sent", "bytes"),
    Column("bytes_down", "Received", "bytes"),
    Column("seconds", "Took", "seconds"),
    Column("reason", "Reason"),
)
ROUNDS = (
    Column("round", "Round", "count", link="address"),
    Column("quorum", "Quorum", "state"),
    Column("loss", "Training loss", "loss"),
    Column("eval_loss", "Evaluation loss", "loss"),
    Column("eval_accuracy", "Accuracy", "share"),
    Column("accepted", "Accepted", "count"),
    Column("rejected", "Not accepted", "count"),
    Column("families", "Families"),
    Column("bytes_up", "Sent", "bytes"),
    Column("bytes_down", "Received", "bytes"),
    Column("seconds", "Took", "seconds"),
    Column("carry_rank", "Carry rank", "count"),
    Column("tail_energy", "Left out of the view", "share"),
    Column("epsilon", "ε", "number"),
    Column("head", "Ledger entry", "hash"),
)
NODES = (
    Column("node", "Node"),
    Column("verdict", "Verdict", "state"),
    Column("family", "Family"),
    Column("size", "Rank or K", "count"),
    Column("share", "Weight in the sum", "number"),
    Column("family_share", "Share of its family", "share"),
    Column("examples", "Examples", "count"),
    Column("train_loss_first", "First loss", "loss"),
    Column("train_loss", "Last loss", "loss"),
    Column("norm", "Norm", "number"),
    Column("staleness", "Late", "count"),
    Column("bytes_up", "Sent", "bytes"),
    Column("bytes_down", "Received", "bytes"),
    Column("seconds", "Took", "seconds"),
    Column("reason", "Reason"),
    Column("signed_by", "Signed with", "hash"),
)


def live(run: RunReader, question: Question) -> Page:
    """The round that is running: phase, arrivals, deadline; curves and bytes of the rounds so far."""
    activity, told = run.activity(), run.live()
    state = told.get("state", "finished" if run.summary() else "unknown")
    rounds = run.rounds()
    nodes = arrivals(run)
    nodes.sort(key=lambda node: (ORDER_OF_STATUS.get(node["status"], 1), node["node"]))
    phase = str(told.get("phase") or "")
    data = {
        **header(run),
        "phase": phase if state in ALIVE else "",
        "phases": list(PHASES),
        "asked": told.get("asked") if state == "running" else None,
        "quorum": told.get("quorum") if state == "running" else None,
        "deadline_seconds": told.get("deadline_seconds") if state == "running" else None,
        "deadline": _deadline(told) if state == "running" else None,
        "real_time": bool(told.get("real_time")),
        "round_started": told.get("round_started"),
        "arrivals": counts(nodes),
        "totals": totals(run),
        "curves": curves(rounds),
        "rollbacks": rollbacks(run),
        "current_round": activity.round,
    }
    table = make_table(
        "arrivals",
        f"Nodes in round {activity.round}" if activity.round else "Nodes",
        ARRIVALS,
        nodes,
        question.choice,
        empty="No round has begun.",
        size=LIVE_NODES,
    )
    return page_of(data, table)


def header(run: RunReader) -> dict[str, Any]:
    """What stands above every view of a run."""
    told, summary, rounds = run.live(), run.summary(), run.rounds()
    done = rounds[-1]["round"] if rounds else 0
    planned = told.get("rounds") or summary.get("rounds")
    state = told.get("state", "finished" if summary else "unknown")
    recent = [row["seconds"] for row in rounds[-PACE_ROUNDS:] if row.get("seconds") is not None]
    left = max((planned or done) - done, 0)
    pace = statistics.median(recent) if recent else None
    return {
        "run": run.identity,
        "name": told.get("name") or summary.get("name") or run.folder.name,
        "state": state,
        "reason": told.get("reason") or "",
        "without_quorum": [row["round"] for row in rounds if not row.get("quorum", True)],
        "preset": told.get("preset") or summary.get("preset"),
        "base_model": told.get("base_model") or summary.get("base_model"),
        "nodes": told.get("nodes") or summary.get("nodes"),
        "round": done,
        "rounds": planned,
        "seconds_left": pace * left if pace is not None and state == "running" else None,
        "started": told.get("started"),
        "head": run.head(),
        "report": run.reported(),
    }


def totals(run: RunReader) -> dict[str, Any]:
    """Sums over the run so far, beside what full exchanges of the nodes asked would take."""
    rounds, told = run.rounds(), run.live()
    took = [row["seconds"] for row in rounds if row["seconds"] is not None]
    asked = sum(row.get("asked") or 0 for row in rounds)
    ranks = sum(row.get("asked_ranks") or 0 for row in rounds)
    latest = next((r for r in reversed(rounds) if r.get("eval_loss") is not None), None)
    before = (run.summary().get("before") or {}).get("loss")
    return {
        **moved(run),
        "seconds_a_round": statistics.fmean(took) if took else None,
        "bytes_full_model": told.get("model_bytes_a_node", 0) * asked or None,
        "bytes_full_lora": told.get("lora_bytes_a_rank", 0) * ranks or None,
        "accepted": sum(row["accepted"] or 0 for row in rounds),
        "rejected": sum(row["rejected"] or 0 for row in rounds),
        "loss": rounds[-1]["loss"] if rounds else None,
        "eval_loss": latest["eval_loss"] if latest else None,
        "eval_accuracy": latest["eval_accuracy"] if latest else None,
        "eval_round": latest["round"] if latest else None,
        "loss_before": before,
        "epsilon": rounds[-1].get("epsilon") if rounds else None,
    }


def moved(run: RunReader) -> dict[str, Any]:
    """Bytes and seconds of all messages: of the rounds, and of the evaluations at the end."""
    lines = [*run.rounds(), *run.evaluations()]
    return {key: sum(line[key] or 0 for line in lines) for key in MOVED}


def curves(rounds: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns by round: what the charts draw."""
    keys = (
        "round",
        "loss",
        "eval_loss",
        "bytes_up",
        "bytes_down",
        "accepted",
        "rejected",
        "seconds",
    )
    return {key: [row.get(key) for row in rounds] for key in keys}


def rounds(run: RunReader, question: Question) -> Page:
    """Every committed round."""
    rows = LazyRows(
        run.rounds()[::-1],
        lambda row: (
            row
            | {
                "quorum": "met" if row.get("quorum", True) else "missed",
                "families": words_of_families(row.get("families")),
                "address": run_address(run.identity, "rounds", row["round"]),
            }
        ),
    )
    accounted = any(row.get("epsilon") is not None for row in run.rounds())
    columns = [column for column in ROUNDS if accounted or column.key != "epsilon"]
    table = make_table(
        "rounds", "Rounds", columns, rows, question.choice, empty="No round was committed yet."
    )
    data = {**header(run), "curves": curves(run.rounds()), "rollbacks": rollbacks(run)}
    return page_of(data, table)


def one_round(run: RunReader, question: Question) -> Page:
    """One round: every node's update, its size, and the gate's verdict."""
    entry = run.round_entry(question.round)
    if entry is None:
        raise NotThere(f"round {question.round} was not committed")
    content, wall, nodes = entry["content"], entry["wall"], run.round_nodes(question.round)
    sums = family_sums((family_of(node), node.get("share")) for node in nodes)
    rows = LazyRows(nodes, lambda node: node_row(node, entry, sums))
    row = next((row for row in run.rounds() if row["round"] == question.round), {})
    last = run.rounds()[-1]["round"] if run.rounds() else question.round
    data = {
        **header(run),
        "shown": question.round,
        "previous": question.round - 1 if question.round > 1 else None,
        "next": question.round + 1 if question.round < last else None,
        "quorum_met": content.get("quorum"),
        "row": {key: value for key, value in row.items() if key != "nodes"},
        "state_digest": content.get("state"),
        "view_rank": content.get("view_rank"),
        "seeds": content.get("seeds"),
        "hash": entry["hash"],
        "previous_hash": entry["previous"],
        "height": entry["height"],
        "began": wall.get("started"),
    }
    title = f"Replies in round {question.round}"
    columns = NODES if entry["signatures"] else NODES[:-1]
    return page_of(data, make_table("nodes", title, columns, rows, question.choice))


def family_sums(weights: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """The weights of a round's updates by family: of each family's mean they add up to its own."""
    found: dict[str, float] = {}
    for family, weight in weights:
        found[family] = found.get(family, 0.0) + (weight or 0.0)
    return found


def family_share(family: str, weight: float | None, sums: Mapping[str, float]) -> float | None:
    """An update's share of its family's mean, 0 to 1; all of a family's are 1 together."""
    whole = sums.get(family)
    return weight / whole if weight and whole else None


def family_of(node: Row) -> str:
    """The family that a node was asked for, of a ledger entry."""
    return str(((node.get("plan") or {}).get("method") or {}).get("family") or "")


def node_row(node: Row, entry: Row, sums: Mapping[str, float]) -> Row:
    """One node's part of a ledger entry, flat."""
    method = (node.get("plan") or {}).get("method") or {}
    report = node.get("report") or {}
    return {
        "node": node.get("node"),
        "family": words(method.get("family")),
        "size": size_of(method),
        "share": node.get("share"),
        "family_share": family_share(family_of(node), node.get("share"), sums),
        "examples": report.get("examples"),
        "train_loss_first": report.get("train_loss_first"),
        "train_loss": report.get("train_loss"),
        "norm": node.get("norm"),
        "staleness": entry["round"] - node.get("round", entry["round"]),
        "bytes_up": node.get("bytes_up"),
        "bytes_down": node.get("bytes_down"),
        "seconds": (entry["wall"].get("nodes") or {}).get(node.get("node")),
        "signed_by": (entry["signatures"].get(node.get("update")) or {}).get("key"),
        "verdict": node.get("verdict"),
        "reason": node.get("reason"),
    }


def size_of(method: Row) -> int | None:
    """A LoRA's or a basis's rank, a pool's seeds, or the number of coordinates."""
    coordinates = method.get("coordinates")
    if isinstance(coordinates, dict):
        return sum(coordinates.values())
    return method.get("rank") or method.get("pool_size") or coordinates


def words(family: object) -> str:
    """ "low_rank" as it reads."""
    return str(family or "").replace("_", " ")


def words_of_families(families: object) -> str:
    """ "2 low rank, 1 sketch"."""
    if not isinstance(families, dict):
        return ""
    return ", ".join(f"{count} {words(name)}" for name, count in sorted(families.items()))


def _deadline(told: Row) -> float | None:
    """When the phase's time is up, in seconds since 1970; None where time is simulated."""
    seconds, began = told.get("deadline_seconds"), told.get("phase_started")
    if not told.get("real_time") or seconds is None or began is None:
        return None
    return float(began) + float(seconds)
