"""The queue takes what a run could carry out, in order, and creates nothing for those who only look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedserver.control import CONTROL, ControlError, ControlQueue, check


def test_requests_wait_in_order_until_they_are_settled(tmp_path: Path) -> None:
    queue = ControlQueue(tmp_path)
    assert queue.pending() == []
    assert not (tmp_path / CONTROL).exists()
    for reason in ("one", "two", "three"):
        queue.ask("pause", {}, who="olga", role="operator", reason=reason)
    first = queue.pending()[0]
    queue.settle(first, "applied", "before round 2")
    assert [request.reason for request in ControlQueue(tmp_path).pending()] == ["two", "three"]
    assert [request.state for request in queue.requests()] == ["pending", "pending", "applied"]
    assert "asked" not in first.content()


@pytest.mark.parametrize(
    ("action", "arguments"),
    [
        ("dance", {}),
        ("pause", {"node": "a"}),
        ("drain", {}),
        ("drain", {"node": ""}),
        ("next_round", {}),
        ("next_round", {"deadline_seconds": 0}),
        ("next_round", {"deadline_seconds": float("nan")}),
        ("next_round", {"deadline_seconds": True}),
        ("next_round", {"quorum": 0}),
        ("next_round", {"quorum": 1.5}),
        ("rollback", {}),
        ("rollback", {"round": -1}),
        ("rollback", {"round": "1"}),
    ],
)
def test_what_no_run_could_do_is_refused_before_it_is_queued(
    action: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ControlError):
        check(action, arguments)
    with pytest.raises(ControlError):
        ControlQueue(tmp_path).ask(action, arguments, who="o", role="operator", reason="why")
    with pytest.raises(ControlError, match="why"):
        ControlQueue(tmp_path).ask("pause", {}, who="o", role="operator", reason="  ")
    assert not (tmp_path / CONTROL).exists()
