"""Who may come in: accounts, the tokens of programs, and what was done about them."""

from __future__ import annotations

from fedserver.dashboard.accounts import Accounts
from fedserver.dashboard.page import Page, Question, page_of
from fedserver.dashboard.tables import Column, make_table

ACCOUNTS = (Column("name", "Account"), Column("role", "Role"))
TOKENS = (
    Column("id", "Token", "mono"),
    Column("name", "Program"),
    Column("role", "Role"),
    Column("issued", "Made", "time"),
    Column("used", "Last used", "time"),
)
RECORD = (
    Column("time", "When", "time"),
    Column("action", "Action"),
    Column("about", "About"),
    Column("who", "Who"),
    Column("reason", "Reason"),
)


def access(accounts: Accounts, question: Question) -> Page:
    """Accounts, tokens of programs, and what was done about them; never a secret."""
    tokens = [vars(token) for token in accounts.tokens()]
    record = [vars(line) for line in accounts.record()]
    return page_of(
        # The tables are cut into pages; what may be revoked is not.
        {"revocable": [{key: token[key] for key in ("id", "name")} for token in tokens]},
        make_table(
            "accounts", "Accounts", ACCOUNTS,
            [{"name": name, "role": role} for name, role in accounts.names()],
            question.choice, searchable=False,
            empty="No account: the link that the terminal shows is the way in.",
        ),
        make_table(
            "tokens", "Tokens of programs", TOKENS, tokens, question.choice, searchable=False,
            empty="No program has a token.",
        ),
        make_table(
            "record", "Record", RECORD, record, question.choice, searchable=False,
            empty="No account and no token was made or removed.",
        ),
    )  # fmt: skip
