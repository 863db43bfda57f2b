"""``report.html``: one run on one page that anybody can open, print and check."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from fedserver import quantities
from fedserver.events import ACCEPTED
from simulations.pages import render, write_page
from simulations.report_figures import figures
from simulations.report_tables import (
    NODE_COLUMNS,
    all_replies,
    byte_table,
    family_table,
    node_table,
    round_columns,
    verdict_words,
)
from simulations.run_directory import Quality, Run, integer, read_run, text

REPLY_LIMIT = 5000
"""Beyond this many replies the page names ``metrics.jsonl`` instead of listing them."""
NO_REPLY = ("missing", "revoked")
"""Verdicts on questions that had no reply."""
ARROW = "\u2009→\u2009"


def write_report(run_directory: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    What is missing is said on the page; only a folder that is no run's is an error.

    Raises:
        RunDirectoryError: there is no such folder, or none of a run's files is in it.
    """
    return write_page(report_html(read_run(run_directory)), run_directory / "report.html")


def report_html(run: Run) -> str:
    """The page of a run."""
    asked = all_replies(run)
    replies = [(number, reply) for number, reply in asked if reply.verdict not in NO_REPLY]
    nodes = node_table(run)
    accepted = sum(reply.verdict == ACCEPTED for _, reply in replies)
    silent = len(asked) - len(replies)
    refused = [
        {
            "node": reply.node,
            "round": number,
            "verdict": verdict_words(reply.verdict),
            "reason": reply.reason,
        }
        for number, reply in asked
        if reply.verdict != ACCEPTED
    ]
    told = quantities.plural(len(replies), "reply")
    unanswered = (
        f"{quantities.plural(silent, 'question')} without a reply in time" if silent else ""
    )
    return render(
        "report.html.jinja",
        run=run,
        arrow=ARROW,
        lede=_lede(run),
        headline=_headline(run),
        traffic=byte_table(run),
        seconds=_seconds(run),
        replies=f"{accepted:,} of {told} accepted",
        unanswered=unanswered,
        figures=figures(run, [node.name for node in nodes]),
        families=family_table(run),
        nodes=nodes,
        nodes_caption="Training loss: first step of the node's first round, last step of its last."
        " Weight: its share of the latest aggregate that it was part of.",
        refused=refused,
        refused_caption=", ".join(
            filter(None, [f"{len(replies) - accepted:,} of {told} not accepted", unanswered])
        ),
        all_passed=f"All {told} passed the gate." if len(replies) > 1 else "The reply passed.",
        reply_count=len(asked),
        reply_limit=REPLY_LIMIT,
        round_columns=round_columns(run),
        node_columns=NODE_COLUMNS,
        verdict_words=verdict_words,
        facts=_facts(run),
        command=_command(run),
        replay=f"fedbraid ledger replay {shlex.quote(_place(run))}",
        version=run.word("version"),
    )


def _lede(run: Run) -> str:
    added = run.line().added
    nodes = len(
        {
            reply.node
            for entry in run.rounds
            if entry.round in added
            for reply in entry.nodes
            if reply.verdict == ACCEPTED and reply.weight
        }
    )
    done, planned = len(run.rounds), run.planned_rounds
    rounds = quantities.plural(done, "round")
    if planned is not None and planned > done:
        rounds = f"{done} of {quantities.plural(planned, 'round')} so far"
    model = run.word("base_model") or text(run.settings.get("base_model")) or "one language model"
    if not nodes:
        return f"No node's update is in the model yet, which is {model}."
    who = f"{nodes} nodes that share no data" if nodes > 1 else "One node"
    together = " together" if nodes > 1 else ""
    return f"{who} fine-tuned {model}{together} in {rounds}."


def _headline(run: Run) -> dict[str, Any]:
    before = run.before if run.before and run.before.loss is not None else None
    after = run.after if run.after and run.after.loss is not None else None
    change = quantities.relative_change(
        before.loss if before else None, after.loss if after else None
    )
    words = ""
    if change is not None:
        direction = "lower" if change < 0 else "higher"
        words = f"{quantities.share_text(abs(change))} {direction}" if change else "unchanged"
    return {
        "before": before,
        "after": after,
        "change": words,
        "better": change is not None and change < 0,
        "repeats": _repeats(before, after),
        "over": _over(run, after) if after else "",
        "last": _last(run) if after is None else None,
    }


def _last(run: Run) -> dict[str, Any] | None:
    """The newest evaluation there is of a model that the run's came by, and which it is of."""
    if run.evaluated is None or run.evaluated[1].loss is None:
        return None
    number, quality = run.evaluated
    which = f"the model after round {number}" if number else "the base model"
    state = f"{which}, the last that was evaluated"
    return {"quality": quality, "of": state, "over": _over(run, quality)}


def _over(run: Run, quality: Quality) -> str:
    """What an evaluation is over; of how many nodes where the run says so."""
    told = f"on {quantities.count_text(quality.tokens)} held-out answer tokens"
    if quality.tokens is None:
        told = "on held-out answer tokens"
    of = integer(run.summary.get("answering"))
    return (
        told
        if quality.nodes is None or of is None
        else f"{told} of {quantities.of_nodes(quality.nodes, of)}"
    )


def _repeats(before: Quality | None, after: Quality | None) -> str:
    """What the loss is on new answers alone, where some held-out rows repeat learnt ones."""
    if after is None or after.new_loss is None or not after.tokens or after.new_tokens is None:
        return ""
    base = before.new_loss if before else None
    change = quantities.relative_change(base, after.new_loss)
    shown = quantities.loss_text(after.new_loss)
    if base is not None and change is not None:
        shown = f"{quantities.loss_text(base)} → {shown}, {quantities.share_text(abs(change))}"
        shown += " lower" if change < 0 else " higher"
    share = quantities.share_text(1 - after.new_tokens / after.tokens)
    return f"{share} of them repeat rows that were learnt; on the others: {shown}"


def _seconds(run: Run) -> float | None:
    seconds = run.number("seconds")
    known = [r.seconds for r in run.rounds if r.seconds is not None]
    return sum(known) if seconds is None and known else seconds


def _facts(run: Run) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is a digest or a path."""
    settings = run.settings
    threads = settings.get("threads")
    entries = [
        ("Description", text(settings.get("description")), False),
        ("Base model", run.word("base_model") or text(settings.get("base_model")), False),
        ("Base digest (SHA-256)", run.word("base_digest"), True),
        ("Layout fingerprint (SHA-256)", run.word("layout"), True),
        ("Ledger head", run.word("head") or (run.rounds[-1].head if run.rounds else ""), True),
        ("Preset", run.preset, False),
        ("Seed", "" if run.seed is None else str(run.seed), False),
        ("Threads per node", str(threads) if isinstance(threads, int) else "", False),
        ("Adapter", run.adapter or "none in the run folder", bool(run.adapter)),
        ("fedbraid", run.word("version"), False),
    ]
    return [(name, value or "not recorded", mono and bool(value)) for name, value, mono in entries]


def _command(run: Run) -> str:
    """The command that repeats the run from its resolved scenario; "" where there is none."""
    if not run.scenario:
        return ""
    place = _place(run)
    return (
        f"fedbraid simulate {shlex.quote(place + '/scenario.toml')}"
        f" --output {shlex.quote(place + '-again')}"
    )


def _place(run: Run) -> str:
    """The run folder as a command names it from where it is."""
    folder = text(run.path.resolve().name) or "run"
    return f"./{folder}" if folder.startswith("-") else folder
