"""What stands in a ledger, in words for a terminal or a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedserver.quantities import duration_text


def action_words(content: Mapping[str, Any]) -> str:
    """What an operator did, of the content of an ``operator`` entry: "drain cafe"."""
    action, arguments = str(content["action"]), content.get("arguments") or {}
    words = action.replace("_", " ")
    match action:
        case "rollback":
            number = arguments["round"]
            return f"roll-back to {f'round {number}' if number else 'the base model'}"
        case "next_round":
            deadline, quorum = arguments.get("deadline_seconds"), arguments.get("quorum")
            told = [] if deadline is None else [f"deadline {duration_text(float(deadline))}"]
            told += [] if quorum is None else [f"quorum {quorum}"]
            return f"{words}: {', '.join(told)}"
        case "export":
            outcome = ": ".join(filter(None, (content.get("outcome"), content.get("note"))))
            return f"{words} {arguments.get('kind', '')}: {outcome}"
        case _:
            return f"{words} {arguments['node']}" if arguments.get("node") else words


def who_words(content: Mapping[str, Any]) -> str:
    """Who acted: "olga (operator)"."""
    return f"{content.get('who')} ({content.get('role')})"


def printable(text: str) -> str:
    """One line of printable characters: nobody's words move the cursor or forge a line."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
