"""Views of what was recorded: the chain, operators' actions, the log."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from fedserver.control import APPLIED
from fedserver.dashboard.page import Page, Question, page_of
from fedserver.dashboard.round_views import header
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.sentences import level, sentence, spoken
from fedserver.dashboard.sound_values import sound_event
from fedserver.dashboard.tables import Column, LazyRows, make_table
from fedserver.ledger import GENESIS_PREVIOUS

ENTRIES = (
    Column("height", "Height", "count"),
    Column("kind", "Kind"),
    Column("round", "Round", "count"),
    Column("time", "Written", "time"),
    Column("content_bytes", "Content", "bytes"),
    Column("hash", "Hash", "hash"),
    Column("previous", "Follows", "hash"),
)
ACTED = (
    Column("action", "Action"),
    Column("arguments", "With"),
    Column("who", "Who"),
    Column("role", "Role"),
    Column("reason", "Reason"),
)
"""Who did what, and why: an operator's entry in words, as of ``action_row``."""
OPERATOR = (
    Column("height", "Height", "count"),
    Column("round", "Before round", "count"),
    *ACTED,
    Column("outcome", "Outcome", "state"),
    Column("note", "Note"),
    Column("time", "Applied", "time"),
)
LOG = (
    Column("time", "Time", "time"),
    Column("level", "Level", "state"),
    Column("event", "Event"),
    Column("round", "Round", "count"),
    Column("node", "Node"),
    Column("text", "What"),
)
DIGEST = re.compile("[0-9a-f]{64}")
LOG_LINES, LOG_PAGE = 2000, 40
"""How many lines may be paged through, and how many stand on a page."""
MOST_OFFERED = 500
"""So many of the last rounds are offered for a replay; every round's own page offers it too."""
QUIET = {"time", "event", "round", "node", "level", "text", "gate_seconds"}


def ledger(run: RunReader, question: Question) -> Page:
    """The chain of entries, and the actions that operators took."""
    entries = run.entries()
    last = next((e["round"] for e in entries if e["kind"] == "round"), None)
    signed, updates = run.signed_updates(last) if last is not None else (0, 0)
    genesis = run.genesis()
    links = all(newer["previous"] == older["hash"] for newer, older in pairwise(entries))
    data = {
        **header(run),
        "height": len(entries),
        "ledger_head": entries[0]["hash"] if entries else None,
        "linked": links and (not entries or entries[-1]["previous"] == GENESIS_PREVIOUS),
        "signed": signed,
        "updates": updates,
        "base_digest": genesis.get("base_digest"),
        "layout": genesis.get("layout"),
        "run_id": genesis.get("run"),
        "sealed_by": run.sealing_key(),
        "rounds_recorded": [e["round"] for e in entries if e["kind"] == "round"][:MOST_OFFERED],
    }
    actions = [
        entry | action_row(entry["content"], entry["wall"])
        for entry in reversed(run.operator_entries())
    ]
    return page_of(
        data,
        make_table("entries", "Entries", ENTRIES, entries, question.choice, searchable=False),
        make_table(
            "actions",
            "Operators' actions",
            OPERATOR,
            actions,
            question.choice,
            empty="No operator has acted on this run.",
            searchable=False,
        ),
    )


def log(run: RunReader, question: Question) -> Page:
    """The run's events, the newest first; every word asked for must stand in a line."""
    limit = 100_000 if question.choice.whole else LOG_LINES
    words = question.choice.words
    # They may stand in what the table leaves out of an event, too.
    found, more = run.log(words, limit, lambda event: str(_line(event)["text"]))
    table = make_table(
        "log",
        "Log",
        LOG,
        LazyRows(found, _line),
        replace(question.choice, words=""),
        empty="No line holds these words." if words else "Nothing was logged yet.",
        size=LOG_PAGE,
    )
    return page_of({**header(run), "more": more, "lines": len(found)}, replace(table, words=words))


def action_row(content: Row, wall: Row) -> Row:
    """What an entry says of an operator's action, in words."""
    return {
        **{key: content.get(key) for key in ("who", "role", "reason")},
        "action": str(content.get("action")).replace("_", " "),
        "arguments": words_of(content.get("arguments") or {}),
        "outcome": content.get("outcome") or APPLIED,
        "note": content.get("note"),
        "time": wall.get("applied"),
    }


def words_of(values: Row) -> str:
    """ "node cafe, round 3"."""
    return ", ".join(
        f"{k.replace('_', ' ')} {spoken(v) if isinstance(v, bool) else v}"
        for k, v in values.items()
        if v is not None
    )


def short(value: object) -> object:
    """A digest by its first digits; the ledger has all of them."""
    return value[:12] if isinstance(value, str) and DIGEST.fullmatch(value) else value


def _line(event: Row) -> Row:
    """One event as a line: what it is, whom it is about, and what it says."""
    event = sound_event(event)
    text = sentence(event)
    if text is None:
        rest = {
            key: spoken(short(value))
            for key, value in event.items()
            if key not in QUIET and not isinstance(value, (list, dict)) and value not in (None, "")
        }
        text = words_of(rest)
    return {
        "time": event.get("time"),
        "level": level(event),
        "event": str(event.get("event", "")).replace("_", " "),
        "round": event.get("round"),
        "node": event.get("node"),
        "text": text,
    }
