"""What is seen of a deployed run from outside of its process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhost.enrolment import JoinRequest, Token
from fedserver import events
from fedserver.configuration import parse
from fedserver.deployment.flower_control import DeploymentError, FlowerControl, LiveRun
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.registry import Registry
from fedserver.deployment.runs import Awaited, LogTail, start
from fedserver.live_log import EVENTS, LiveLog

RUN = events.RunStarted("run", "braid", 9, 1, (), "model", "folder")


@given(cuts=st.lists(st.integers(0, 400), max_size=8), texts=st.lists(st.text(), max_size=5))
def test_a_log_is_read_once_however_it_grows(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    tail = LogTail(folder)
    assert list(tail.read()) == []
    notices = [events.Notice("info", text) for text in texts]
    told: list[events.Event] = [RUN, *notices, events.RoundsEnded("finished")]
    log = LiveLog(folder, lambda event: None, now=lambda: 12.5)
    for event in told:
        log(event)
    content = (folder / EVENTS).read_bytes()
    heard: list[events.Event] = []
    for size in [*sorted(cuts), len(content)]:
        (folder / EVENTS).write_bytes(content[:size])
        for event in tail.read():
            assert tail.now() == 12.5
            heard.append(event)
    assert heard == told
    # Whoever begins to look now hears nothing of what was.
    assert list(LogTail(folder).read()) == []


class Connected(FlowerControl):
    """Whom a SuperLink would call connected."""

    def __init__(self, *names: str) -> None:
        super().__init__(0, Path())
        self.names = set(names)

    def online(self) -> set[str]:
        return self.names


def test_a_revoked_node_is_said_to_be_that(tmp_path: Path) -> None:
    names = ("clinic", "phone")
    file = tmp_path / "enrolment.db"
    registry = Registry(file)
    for name in names:
        token = Token.new(bytes(32))
        registry.invite(name, token, 2e12)
        secret = token.secret.hex()
        request = JoinRequest(
            secret=secret, transport_key=name, update_key=name.encode().hex().ljust(64, "0"),
            transport_signature="0" * 64, update_signature="0" * 128,
        )  # fmt: skip
        registry.redeem(request, 1e9)
    configuration = parse(
        {"preset": "fedkseed", "rounds": 1, "quorum": 1, "nodes": [{"name": n} for n in names]}
    )

    def news(*online: str) -> str | None:
        return Awaited(configuration, file, Connected(*online)).news(0.0, remind=False)

    assert news(*names) == "2 of 2 nodes are connected; they load their model"
    registry.revoke("phone", 1e9)
    registry.close()
    # The SuperLink has not missed it yet.
    assert news(*names) == "1 of 1 nodes are connected; they load their model; phone is revoked"
    assert news("phone") == (
        "waits for clinic (not connected); 0 of 1 nodes are connected; phone is revoked"
    )


class Starting(FlowerControl):
    """Runs that are started, where two commands look at once what is under way if nothing keeps them."""

    def __init__(self) -> None:
        super().__init__(0, Path())
        self.started: list[LiveRun] = []
        self.both = threading.Barrier(2, timeout=0.2)

    def live_runs(self) -> list[LiveRun]:
        found = list(self.started)
        with suppress(threading.BrokenBarrierError):
            self.both.wait()
        return found

    def start_run(self, bundle: bytes, settings: Mapping[str, str | bool]) -> int:
        self.started.append(LiveRun(len(self.started) + 1, settings))
        return len(self.started)


@pytest.mark.parametrize("join", [False, True])
def test_of_two_commands_that_start_a_run_at_once_one_does(join: bool, tmp_path: Path) -> None:
    control, folder = Starting(), ServerFolder(tmp_path)
    live = LiveRun(0, {"output": str(tmp_path / "runs" / "tiny")})
    with ThreadPoolExecutor() as pool:
        tries = [pool.submit(start, folder, control, live, b"", join=join) for _ in range(2)]
    errors = [error for one in tries if (error := one.exception())]
    assert len(control.started) == 1
    assert [one.result().run_id for one in tries if not one.exception()] == [1] * (1 + join)
    assert len(errors) == (not join)
    for error in errors:
        assert isinstance(error, DeploymentError)
        assert "server follow" in str(error)
