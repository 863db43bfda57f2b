"""Devices of the deployment that is served: who has joined, who may, and who let them.

An invitation belongs to no run, so it is recorded in a ledger of the dashboard's own, beside the
accounts: sealed and chained like a run's, and checked by the same ``fedbraid ledger verify``. What the
command ``fedbraid server invite`` makes is listed with the open ones, and recorded nowhere.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedhost.node_names import is_node_name
from fedserver.control import OPERATOR, ControlError
from fedserver.dashboard import recording
from fedserver.dashboard.accounts import Session
from fedserver.dashboard.home import deployment_of, home_of
from fedserver.dashboard.ledger_views import ACTED, action_row
from fedserver.dashboard.page import Page, Question, page_of
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.tables import Column, make_table
from fedserver.ledger import Ledger, LedgerError
from fedserver.ledger_database import DATABASE

if TYPE_CHECKING:
    from fedserver.deployment.folder import ServerFolder
    from fedserver.deployment.invitation import Invitation

HOURS, MOST_HOURS = 24.0, 24.0 * 30
JOINED = (
    Column("name", "Node"),
    Column("state", "State", "state"),
    Column("joined", "Joined", "time"),
    Column("revoked", "Revoked", "time"),
    Column("update_key", "Signs with", "hash"),
)
INVITED = (
    Column("name", "Node"),
    Column("expires", "Token valid until", "time"),
)
INVITATIONS = (
    Column("height", "Entry", "count"),
    *ACTED,
    Column("time", "When", "time"),
    Column("hash", "Hash", "hash"),
)


def devices(root: Path, question: Question) -> Page:
    """The nodes of the deployment, open invitations, and what operators did about them."""
    from fedserver.deployment.folder import FolderError

    folder = deployment_of(root)
    joined: list[Row] = []
    invited: list[Row] = []
    recorded: list[Row] = []
    address: str | None = None
    nobody = "Nobody has invited a device from this dashboard."
    # What can be shown is shown, beside what is wrong with the rest.
    problems: list[str] = []
    if folder is not None:
        try:
            address = f"https://{folder.settings().address}"
        except FolderError as error:
            problems.append(str(error))
        try:
            joined, invited = _registered(folder)
        except sqlite3.Error as error:
            problems.append(f"{folder.registry} cannot be read: {error}; restore it from a copy")
    try:
        recorded = _recorded(root)
    except (LedgerError, OSError) as error:
        problems.append(str(error))
        nobody = "The record cannot be read."
    data = {
        "folder": str(root),
        "deployment": None if folder is None else str(folder.path),
        "address": address,
        "hours": HOURS,
        "ledger": str(_ledger_folder(root)),
        "problems": problems,
    }
    return page_of(
        data,
        make_table(
            "joined", "Joined", JOINED, joined, question.choice, empty="No device has joined yet."
        ),
        make_table(
            "invited", "Open invitations", INVITED, invited, question.choice,
            empty="No invitation is open.", searchable=False,
        ),
        make_table(
            "invitations", "Recorded actions", INVITATIONS, recorded, question.choice,
            empty=nobody, searchable=False,
        ),
    )  # fmt: skip


def invite(root: Path, form: Mapping[str, str], who: Session) -> Invitation:
    """Make an enrolment token and record who did, for which node and why; the token is not recorded.

    Raises:
        ControlError: no deployment is served, or something is missing or wrong in the form.
        LedgerError: it cannot be recorded; then the token is void.
    """
    from fedhost.enrolment import EnrolmentRefused
    from fedserver.deployment.folder import FolderError
    from fedserver.deployment.invitation import invite as make

    folder = deployment_of(root)
    if folder is None:
        raise ControlError(
            f"{root} is no deployment, so no device can join: 'fedbraid server up DIR' makes one"
        )
    name, reason = form.get("name", "").strip(), form.get("reason", "").strip()
    if not is_node_name(name):
        raise ControlError("a node's name is letters, digits, spaces and . _ -, at most 64 of them")
    if not reason:
        raise ControlError("say why: the reason stands in the ledger")
    try:
        hours = float(form.get("hours", "").strip() or HOURS)
    except ValueError:
        raise ControlError(f"hours: {form['hours']!r} is no number") from None
    if not 0 < hours <= MOST_HOURS:
        raise ControlError(f"a token holds for up to {MOST_HOURS:.0f} hours")
    try:
        made = make(folder, name, hours)
    except (EnrolmentRefused, FolderError, OSError, sqlite3.Error) as error:
        raise ControlError(str(error)) from None
    content = {
        "action": "invite",
        "arguments": {"node": name, "hours": hours},
        "who": who.name,
        "role": who.role,
        "reason": reason[:500],
    }
    target = _ledger_folder(root)
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        recording.append(target, OPERATOR, 0, content, {"applied": time.time()}, create=True)
    except BaseException:
        # Nobody has seen the token yet, and without a record nobody shall.
        _withdraw(folder, made)
        raise
    return made


def _registered(folder: ServerFolder) -> tuple[list[Row], list[Row]]:
    """The nodes, and the open invitations by name."""
    from fedserver.deployment.registry import Registry

    if not folder.registry.is_file():
        return [], []
    registry = Registry(folder.registry)
    try:
        joined = [
            {
                "name": node.name,
                "state": "revoked" if node.revoked is not None else "member",
                "joined": node.joined,
                "revoked": node.revoked,
                "update_key": node.update_key,
            }
            for node in registry.nodes()
        ]
        found = registry.open_invitations(time.time())
    finally:
        registry.close()
    return joined, [{"name": name, "expires": found[name]} for name in sorted(found)]


def _withdraw(folder: ServerFolder, made: Invitation) -> None:
    """Make this token void: another of the same name may have replaced it meanwhile."""
    from fedhost.enrolment import Token
    from fedserver.deployment.registry import Registry

    registry = Registry(folder.registry)
    try:
        registry.withdraw(Token.parse(made.token))
    finally:
        registry.close()


def _recorded(root: Path) -> list[Row]:
    """The dashboard's own ledger, the newest first; nothing where nobody has invited yet.

    Raises:
        LedgerError: there is one that cannot be read.
    """
    if not (_ledger_folder(root) / DATABASE).exists():
        return []
    ledger = Ledger(_ledger_folder(root))
    try:
        entries = list(ledger.entries(OPERATOR))
    finally:
        ledger.close()
    return [
        {
            "height": entry.height,
            **action_row(entry.content, entry.wall),
            "hash": entry.hash,
        }
        for entry in reversed(entries)
    ]


def _ledger_folder(root: Path) -> Path:
    return home_of(root) / "ledger"
