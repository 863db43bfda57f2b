"""The round that is running, folded from the end of ``events.jsonl``: each byte is read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedserver.dashboard.sound_values import sound_event, sound_members

WAITING, WORKING = "waiting", "working"


@dataclass(frozen=True)
class Seen:
    """The current round at one moment: ``members`` as they said who they are, ``nodes`` by what they do.

    The rows may follow the log; which there are does not change.
    """

    round: int
    members: Mapping[str, dict[str, Any]]
    nodes: Mapping[str, dict[str, Any]]


class Activity:
    """Who has been asked and who has answered, in the current round of one process."""

    def __init__(self, path: Path, live: dict[str, Any], key: Any) -> None:
        self.key = key
        self.members: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.round = 0
        self._path = path
        self._offset = int(live.get("round_offset") or 0)
        self._rest = b""
        self._meet(int(live.get("run_offset") or 0))

    def advance(self, live: dict[str, Any]) -> None:
        """Read on to the end of the log."""
        # After a long silence of viewers only the last round matters.
        ahead = int(live.get("round_offset") or 0)
        if ahead > self._offset:
            self._offset, self._rest = ahead, b""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for event in _events(lines):
            try:
                self._apply(sound_event(event))
            except KeyError:
                # A line that does not say what it has to is damaged; the others count.
                continue

    def seen(self) -> Seen:
        """What stands now, for a reader whom what follows must not disturb."""
        return Seen(self.round, self.members, dict(self.nodes))

    def _meet(self, offset: int) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                event = json.loads(file.readline() or b"{}")
        except (OSError, ValueError, RecursionError):
            return
        for node in sound_members(event.get("nodes") if isinstance(event, dict) else None):
            self.members[node["node"]] = node

    def _apply(self, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "round_started":
                self._begin(event["round"])
            case "node_started":
                self._node(event["node"]).update(status=WORKING, since=event["time"])
            case "node_progress":
                node = self._node(event["node"])
                if node["status"] == WAITING:
                    node["status"] = WORKING
                node |= {key: event[key] for key in ("step", "steps", "loss")}
            case "node_replied" if event["verdict"] != "late":
                node = self._node(event["node"])
                node |= {
                    key: event[key]
                    for key in ("reason", "sends", "bytes_up", "bytes_down", "seconds")
                }
                node |= {
                    "status": event["verdict"],
                    "loss": event["train_loss"]
                    if event["train_loss"] is not None
                    else node["loss"],
                    "answered": event["time"],
                }
            case _:
                pass

    def _begin(self, number: int) -> None:
        self.round = number
        self.nodes = {}
        for name in self.members:
            self._node(name)

    def _node(self, name: str) -> dict[str, Any]:
        return self.nodes.setdefault(
            name,
            {
                "node": name,
                "status": WAITING,
                "sends": self.members.get(name, {}).get("sends", ""),
                "step": None,
                "steps": None,
                "loss": None,
                "bytes_up": None,
                "bytes_down": None,
                "seconds": None,
                "reason": "",
                "since": None,
                "answered": None,
            },
        )


def _events(lines: list[bytes]) -> list[dict[str, Any]]:
    """The events of some lines, without those that are none."""
    try:
        # Thousands of replies: one text is parsed much faster than as many small ones.
        found = json.loads(b"[" + b",".join(filter(None, lines)) + b"]")
    except (ValueError, RecursionError):
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
    return [event for event in found if isinstance(event, dict)]
