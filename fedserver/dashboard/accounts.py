"""Who may look and who may act: local accounts with scrypt hashes, sessions, and tokens for programs.

Accounts stand in ``.dashboard/accounts.db`` below the served folder (of a deployment: below its runs),
readable by its owner alone.
Sessions live in memory: a restart ends them all. Whoever changes or removes an account, by a command of
another process too, ends its sessions: they are of one generation of it, which its salt is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedserver.dashboard.home import home_of

if TYPE_CHECKING:
    from fedserver.deployment.invitation import Invitation

VIEWER, OPERATOR = "viewer", "operator"
ROLES = (VIEWER, OPERATOR)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

# RFC 7914: N, r, p; 32 MiB and about a tenth of a second for every guess.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 15, 8, 1
SCRYPT_MEMORY = 64 << 20
SHORTEST_PASSWORD = 10
FAILURES_ALLOWED = 5
LOCKED_SECONDS = 900.0
SESSION_SECONDS = 12 * 3600.0
IDLE_SECONDS = 2 * 3600.0
MOST_SESSIONS = 10_000
SETTLED_NANOSECONDS = 2_000_000_000
USE_SECONDS = 60.0
"""The last use of a token is written down at most this often."""
SHOWN_DIGITS = 12
TERMINAL = "terminal"
"""Who acts by a command: whoever may write the folder."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, salt BLOB NOT NULL, hash BLOB NOT NULL,
    failures INTEGER NOT NULL DEFAULT 0, locked_until REAL NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS tokens (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, issued REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS uses (digest TEXT PRIMARY KEY, used REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS record (
    number INTEGER PRIMARY KEY, time REAL NOT NULL, action TEXT NOT NULL, about TEXT NOT NULL,
    who TEXT NOT NULL, reason TEXT NOT NULL
) STRICT;
"""


class AccountError(Exception):
    """An account cannot be made or used; the message says why and what to do."""


@dataclass(frozen=True)
class Token:
    """A program's token without its secret; ``id`` are the first digits of its SHA-256."""

    id: str
    name: str
    role: str
    issued: float
    used: float | None


@dataclass(frozen=True)
class Recorded:
    """What was done about accounts and tokens, when (seconds since 1970), by whom and why."""

    time: float
    action: str
    about: str
    who: str
    reason: str


@dataclass
class Session:
    """Somebody who has signed in. ``csrf`` must come back with every action.

    ``generation``: the salt of the account as it was then; b"" for who has no account here.
    ``invited``: by the terminal's link, which holds as long as there are no accounts. ``made``: an
    enrolment token that its next look at the devices shows, and no other.
    """

    name: str
    role: str
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    began: float = 0.0
    seen: float = 0.0
    generation: bytes = b""
    invited: bool = False
    made: Invitation | None = None

    @property
    def may_act(self) -> bool:
        """Whether this is an operator."""
        return self.role == OPERATOR


class Accounts:
    """The accounts of one served folder."""

    def __init__(self, root: Path, *, now: Callable[[], float] = time.time) -> None:
        self._folder = home_of(root)
        self._now = now
        self._lock = threading.RLock()
        # Hashing takes a tenth of a second, in which the sessions of others go on.
        self._guessing = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._invitation = ""
        self._generations: tuple[object, dict[str, bytes]] = (None, {})

    def names(self) -> list[tuple[str, str]]:
        """Name and role of every account."""
        if not self._path.is_file():
            return []
        with self._database() as database:
            return list(database.execute("SELECT name, role FROM accounts ORDER BY name"))

    def add(self, name: str, role: str, password: str) -> None:
        """Make an account, or give one a new password and role; its sessions end.

        With the first one the terminal's link ends, and the sessions of who came by it.
        """
        if not NAME.fullmatch(name):
            raise AccountError("a name is letters, digits and . _ @ -, at most 64 of them")
        if role not in ROLES:
            raise AccountError(f"role {role!r} is none of {', '.join(ROLES)}")
        if len(password) < SHORTEST_PASSWORD:
            raise AccountError(f"a password has at least {SHORTEST_PASSWORD} characters")
        salt = secrets.token_bytes(16)
        with self._database() as database:
            database.execute(
                "INSERT INTO accounts (name, role, salt, hash) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET role = excluded.role, salt = excluded.salt,"
                " hash = excluded.hash, failures = 0, locked_until = 0",
                (name, role, salt, _hash(password, salt)),
            )
            self._note(database, "set account", f"{name} ({role})")

    def remove(self, name: str) -> None:
        """Delete an account, its tokens and its sessions."""
        with self._database() as database:
            if not database.execute("DELETE FROM accounts WHERE name = ?", (name,)).rowcount:
                raise AccountError(f"there is no account {name!r}")
            database.execute("DELETE FROM tokens WHERE name = ?", (name,))
            self._note(database, "remove account", f"{name}, with its tokens")

    def issue_token(self, name: str, role: str) -> str:
        """A token for a program, shown once; only its SHA-256 is kept."""
        if role not in ROLES:
            raise AccountError(f"role {role!r} is none of {', '.join(ROLES)}")
        token = secrets.token_urlsafe(32)
        with self._database() as database:
            database.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?)", (_digest(token), name, role, self._now())
            )
            about = f"{_digest(token)[:SHOWN_DIGITS]} of {name} ({role})"
            self._note(database, "issue token", about)
        return token

    def tokens(self) -> list[Token]:
        """The tokens that hold, the newest first."""
        if not self._path.is_file():
            return []
        with self._database() as database:
            rows = database.execute(
                "SELECT substr(digest, 1, ?), name, role, issued, used FROM tokens"
                " LEFT JOIN uses USING (digest) ORDER BY issued DESC, digest",
                (SHOWN_DIGITS,),
            ).fetchall()
        return [Token(*row) for row in rows]

    def revoke_token(self, identity: str, *, who: str = TERMINAL, reason: str = "") -> Token:
        """End a token, from the next request of its program on.

        Raises:
            AccountError: no token, or more than one, begins with these digits.
        """
        found = [token for token in self.tokens() if identity and token.id.startswith(identity)]
        if len(found) != 1:
            which = "several tokens begin" if found else "no token begins"
            raise AccountError(f"{which} with {identity!r}: fedbraid accounts tokens lists them")
        (token,) = found
        with self._database() as database:
            for table in ("tokens", "uses"):
                database.execute(
                    f"DELETE FROM {table} WHERE substr(digest, 1, ?) = ?", (SHOWN_DIGITS, token.id)
                )
            about = f"{token.id} of {token.name} ({token.role})"
            self._note(database, "revoke token", about, who, reason)
        return token

    def record(self) -> list[Recorded]:
        """What was done about accounts and tokens, the newest first."""
        if not self._path.is_file():
            return []
        with self._database() as database:
            rows = database.execute(
                "SELECT time, action, about, who, reason FROM record ORDER BY number DESC"
            ).fetchall()
        return [Recorded(*row) for row in rows]

    def sign_in(self, name: str, password: str) -> str:
        """The cookie of a new session.

        Raises:
            AccountError: name or password is wrong, or the account is locked after failures. The
                words do not tell which names exist.
        """
        wrong = AccountError("name or password is wrong, or the account is locked for a while")
        with self._guessing:
            with self._database() as database:
                row = database.execute(
                    "SELECT role, salt, hash, failures, locked_until FROM accounts WHERE name = ?",
                    (name,),
                ).fetchone()
            role, salt, stored, failures, locked_until = row or (VIEWER, b"", b"", 0, 0.0)
            # An unknown name takes as long as a known one.
            right = hmac.compare_digest(_hash(password, salt), stored)
            if row is None or locked_until > self._now():
                raise wrong
            failures = 0 if right else failures + 1
            locked = self._now() + LOCKED_SECONDS if failures >= FAILURES_ALLOWED else 0.0
            with self._database() as database:
                database.execute(
                    "UPDATE accounts SET failures = ?, locked_until = ? WHERE name = ?",
                    (0 if locked else failures, locked, name),
                )
            if not right:
                raise wrong
            return self.open_session(name, role, salt)

    def open_session(
        self, name: str, role: str, generation: bytes = b"", *, invited: bool = False
    ) -> str:
        """The cookie of a new session for somebody whose identity is established.

        ``generation``: of the account, where it is one of this folder. ``invited``: by the terminal.
        """
        now = self._now()
        token = secrets.token_urlsafe(32)
        with self._lock:
            for key in [k for k, s in self._sessions.items() if self._over(s)]:
                del self._sessions[key]
            if len(self._sessions) >= MOST_SESSIONS:
                del self._sessions[min(self._sessions, key=lambda k: self._sessions[k].seen)]
            self._sessions[_digest(token)] = Session(
                name, role, began=now, seen=now, generation=generation, invited=invited
            )
        return token

    def session(self, cookie: str, *, used: bool = True) -> Session | None:
        """Who holds this cookie. ``used``: this is a use of it; an open page alone is none.

        None where it is unknown, old, unused for long, or of an account that was changed or removed.
        """
        with self._lock:
            found = self._sessions.get(_digest(cookie)) if cookie else None
            if found is None or self._over(found):
                return None
            known = self._generations_now()
            replaced = found.generation and known.get(found.name) != found.generation
            if replaced or (found.invited and known):
                del self._sessions[_digest(cookie)]
                return None
            if used:
                found.seen = self._now()
            return found

    def bearer(self, token: str) -> Session | None:
        """A program by its token. It sends no cookie, so no page can act in its name."""
        if not token or not self._path.is_file():
            return None
        with self._database() as database:
            row = database.execute(
                "SELECT name, role, used FROM tokens LEFT JOIN uses USING (digest) WHERE digest = ?",
                (_digest(token),),
            ).fetchone()
            if row is None:
                return None
            if row[2] is None or self._now() - row[2] >= USE_SECONDS:
                database.execute(
                    "INSERT OR REPLACE INTO uses VALUES (?, ?)", (_digest(token), self._now())
                )
        return Session(row[0], row[1])

    def sign_out(self, cookie: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(_digest(cookie), None)

    def invite(self) -> str:
        """A word that signs in once as the operator of this machine, where there are no accounts."""
        with self._lock:
            self._invitation = secrets.token_urlsafe(24)
            return self._invitation

    def accept(self, invitation: str) -> str | None:
        """The cookie for an invitation, which is then spent; None for any other word.

        With the first account the link is spent, too.
        """
        with self._lock:
            if self._generations_now():
                self._invitation = ""
            if not self._invitation or not hmac.compare_digest(
                invitation.encode(), self._invitation.encode()
            ):
                return None
            self._invitation = ""
            return self.open_session("local", OPERATOR, invited=True)

    @property
    def _path(self) -> Path:
        return self._folder / "accounts.db"

    def _over(self, session: Session) -> bool:
        now = self._now()
        return now - session.began > SESSION_SECONDS or now - session.seen > IDLE_SECONDS

    def _generations_now(self) -> dict[str, bytes]:
        """Of every account as it is now; the database is read when its file has changed."""
        try:
            # Not opened: closing it would end the locks that SQLite has on it for other threads.
            file = os.stat(self._path)
        except FileNotFoundError:
            return {}
        stamp = (file.st_ino, file.st_mtime_ns, file.st_size)
        if self._generations[0] != stamp:
            with self._database() as database:
                found = dict(database.execute("SELECT name, salt FROM accounts"))
            # What changed just now may change once more within the same tick of the clock.
            settled = time.time_ns() - file.st_mtime_ns > SETTLED_NANOSECONDS
            self._generations = (stamp if settled else None, found)
        return self._generations[1]

    def _note(
        self,
        database: sqlite3.Connection,
        action: str,
        about: str,
        who: str = TERMINAL,
        reason: str = "",
    ) -> None:
        database.execute(
            "INSERT INTO record (time, action, about, who, reason) VALUES (?, ?, ?, ?, ?)",
            (self._now(), action, about, who, reason),
        )

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._path.exists():
            os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600))
        database = sqlite3.connect(self._path, timeout=10)
        try:
            database.executescript(_SCHEMA)
            with database:
                yield database
        finally:
            database.close()


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(
        password.encode(),
        salt=salt,
        n=SCRYPT_N,
        r=SCRYPT_R,
        p=SCRYPT_P,
        maxmem=SCRYPT_MEMORY,
        dklen=32,
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
