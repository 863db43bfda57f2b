"""Verifying a ledger is every viewer's to ask for, and costs one process however many ask."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import httpx
import pytest

from fedserver.dashboard import recording, verifications
from fedserver.dashboard.accounts import VIEWER, Accounts
from fedserver.dashboard.application import make_application


def counting(folder: Path, instead: str = "") -> tuple[Path, Path]:
    """A Python that writes down when it begins and ends, and where it does."""
    log, program = folder / "begun", folder / "python"
    command = instead or f'"{sys.executable}" "$@"'
    program.write_text(f'#!/bin/sh\necho begin >> "{log}"\n{command}\necho end >> "{log}"\n')
    program.chmod(0o700)
    return program, log


def ask(root: Path, names: list[str]) -> list[httpx.Response]:
    """A viewer who asks for all of these at once."""
    accounts = Accounts(root)
    application = make_application(root, accounts, hosts=["testserver"])
    bearer = {"authorization": f"Bearer {accounts.issue_token('viewer', VIEWER)}"}

    async def all_at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(
            transport=transport, base_url="https://testserver", headers=bearer, timeout=None
        ) as client:
            paths = [f"/api/v1/runs/{name}/ledger/verify" for name in names]
            return list(await asyncio.gather(*map(client.get, paths)))

    return asyncio.run(all_at_once())


def test_many_who_ask_share_one_process_and_ledgers_take_turns(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "mixed", runs / "other")
    program, log = counting(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    answers = [answer.json() for answer in ask(runs, ["mixed", "other"] * 3)]
    assert [answer["problems"] for answer in answers] == [[]] * 6
    assert len({answer["head"] for answer in answers}) == 1
    assert log.read_text().split() == ["begin", "end"] * 2


def test_one_that_hangs_is_ended_and_others_than_a_few_are_told_to_wait(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "mixed", runs / "other")
    program, log = counting(tmp_path, "exec sleep 600")
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(recording, "LONGEST_SECONDS", 0.5)
    monkeypatch.setattr(verifications, "MOST_AT_ONCE", 1)
    # Either may come first.
    hung, refused = sorted(ask(runs, ["mixed", "other"]), key=lambda answer: answer.status_code)
    assert "fedbraid ledger verify" in hung.json()["problems"][0]
    assert refused.status_code == 503
    assert log.read_text().split() == ["begin"]
