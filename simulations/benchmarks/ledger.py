"""How long a walk over a ledger takes, and how many of its possible changes the walk finds.

    python -m simulations.benchmarks.ledger --entries 10000 --mutations 1000

The first table: a ledger whose every entry names an update that a node signed; chain, seals, signatures,
Merkle roots, checkpoint and blobs are checked. The second: a smaller ledger is changed once, at random,
and has to be found out, by a reader who knows the server's public key from elsewhere.
"""

from __future__ import annotations

import json
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aggregators.keys import load, public_hex
from aggregators.messages import Report, encode_reply
from aggregators.signatures import sign_reply, split_signature
from fedserver.checkpoint import FILE as CHECKPOINT
from fedserver.entry import canonical, entry_hash
from fedserver.ledger import Ledger
from fedserver.sealing import Sealer, server_key_file
from simulations.benchmarks.tables import table_console

COLUMNS = ("kind", "content", "previous", "hash", "wall", "signatures", "seal")
SMALL = 24  # entries of the ledger that is changed


@dataclass(frozen=True)
class Mutation:
    """One change of a ledger's files: what kind it is, and what it did in words."""

    kind: str
    done: str


def fill(folder: Path, entries: int, nodes: int = 1, chance: random.Random | None = None) -> str:
    """Write a ledger of rounds with signed updates; returns the server's public key."""
    dice = chance or random.Random(0)
    keys = [Ed25519PrivateKey.from_private_bytes(dice.randbytes(32)) for _ in range(nodes)]
    ledger = Ledger(folder, create=True)
    state = ledger.put(b"state")
    numbers = range(1, entries + 1)
    quick = entries <= SMALL
    for number in numbers if quick else track(numbers, "writing", console=Console(stderr=True)):
        rows, signatures = [], {}
        for place, key in enumerate(keys):
            name = f"node-{place}"
            reply = encode_reply(
                run="0" * 32, round=number, node=name, nonce=dice.randbytes(16).hex(),
                layout="1" * 64, base_digest="2" * 64, report=Report(examples=number),
                update=None, dtype=None,
            )  # fmt: skip
            _, signature = split_signature(sign_reply(reply, key))
            blob = ledger.put(reply)
            assert signature is not None
            signatures[blob] = vars(signature)
            rows.append({"node": name, "round": number, "update": blob, "verdict": "accepted"})
        content = {"quorum": True, "nodes": rows, "state": state}
        ledger.append("round", number, content, {"seconds": dice.random()}, signatures)
    ledger.close()
    return public_hex(load(server_key_file(folder)))


def mutate(folder: Path, chance: random.Random) -> Mutation:
    """Change a ledger's folder once. What an attacker has is all of it but the server's key."""
    kinds: list[Callable[[Path, sqlite3.Connection, random.Random], str]] = [
        _flip, _flip, _flip, _flip_number, _flip_file, _reorder, _swap_beside, _truncate, _remove,
        _fork, _unsign,
    ]  # fmt: skip
    chosen = chance.choice(kinds)
    database = sqlite3.connect(folder / "ledger.db")
    database.text_factory = bytes
    database.execute("PRAGMA synchronous=OFF")
    try:
        with database:
            done = chosen(folder, database, chance)
    finally:
        database.close()
    return Mutation(chosen.__name__.strip("_").split("_")[0], done)


def survey(
    mutations: int, seed: int, folder: Path, *, nodes: int = 2
) -> tuple[Counter[str], list[Mutation]]:
    """How many mutations of each kind were made, and those that the walk did not find."""
    chance = random.Random(seed)
    key = fill(folder, SMALL, nodes, chance)
    _expect_sound(folder, key)
    untouched = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made: Counter[str] = Counter()
    missed = []
    for _ in track(range(mutations), "changing and walking", console=Console(stderr=True)):
        mutation = mutate(folder, chance)
        made[mutation.kind] += 1
        ledger = Ledger(folder)
        if not ledger.verify(key=key):
            missed.append(mutation)
        ledger.close()
        _restore(folder, untouched)
    _expect_sound(folder, key)
    return made, missed


def _restore(folder: Path, untouched: dict[Path, bytes]) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path not in untouched:
            path.unlink()
    for path, content in untouched.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def _expect_sound(folder: Path, key: str) -> None:
    ledger = Ledger(folder)
    problems = ledger.verify(key=key)
    ledger.close()
    assert not problems, problems


def _flip(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    """One bit of one byte of one text."""
    height, column = chance.randrange(SMALL), chance.choice(COLUMNS)
    (text,) = database.execute(f"SELECT {column} FROM entries WHERE height = {height}").fetchone()
    changed = bytearray(text)
    at = chance.randrange(len(changed))
    changed[at] ^= 1 << chance.randrange(8)
    database.execute(
        f"UPDATE entries SET {column} = CAST(? AS TEXT) WHERE height = ?", (bytes(changed), height)
    )
    return f"{column} of entry {height}, byte {at}"


def _flip_number(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    height, column = chance.randrange(SMALL), chance.choice(["height", "round"])
    bit = 1 << chance.randrange(5, 40) if column == "height" else 1 << chance.randrange(40)
    database.execute(
        f"UPDATE entries SET {column} = ({column} | {bit}) - ({column} & {bit}) WHERE height = ?",
        (height,),
    )
    return f"{column} of entry {height}, {bit}"


def _flip_file(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    """One bit of the checkpoint or of an update."""
    paths = [folder / CHECKPOINT, chance.choice(sorted(folder.glob("blobs/*/*.safetensors")))]
    path = chance.choice(paths)
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))
    return f"{path.name}, byte {at}"


def _reorder(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    """Two entries change places, whole or with all but their hashes."""
    one, two = chance.sample(range(SMALL), 2)
    _swap(database, one, two, chance.choice([("round", *COLUMNS), ("round", "kind", "content")]))
    return f"entries {one} and {two}"


def _swap_beside(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    one, two = chance.sample(range(SMALL), 2)
    column = chance.choice(["wall", "signatures", "seal"])
    _swap(database, one, two, (column,))
    return f"{column} of entries {one} and {two}"


def _truncate(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    first = chance.randrange(SMALL)
    database.execute("DELETE FROM entries WHERE height >= ?", (first,))
    if chance.random() < 0.3:
        (folder / CHECKPOINT).unlink()
        return f"from entry {first}, and the checkpoint"
    return f"from entry {first}"


def _remove(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    height = chance.randrange(SMALL)
    database.execute("DELETE FROM entries WHERE height = ?", (height,))
    if chance.random() < 0.5:
        database.execute("UPDATE entries SET height = -height - 1 WHERE height > ?", (height,))
        database.execute("UPDATE entries SET height = -height - 2 WHERE height < 0")
    return f"entry {height}"


def _fork(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    """Another history from some entry on, chained as it should be, with old seals or a forger's."""
    first, sealed = chance.randrange(SMALL), chance.random() < 0.7
    rows = database.execute(
        "SELECT kind, round, content, hash, wall, signatures, seal FROM entries ORDER BY height"
    ).fetchall()
    forger = Sealer(folder, folder / "forger.pem", fresh=True)
    for _, _, _, digest, _, _, seal in rows[:first]:
        forger.follow(digest.decode(), seal.decode())
    for height in range(first, SMALL):
        number = int(rows[height][1])
        kind, content, wall, signatures, seal = (
            rows[height][place].decode() for place in (0, 2, 4, 5, 6)
        )
        if height == first:
            content = content.replace('"quorum":true', '"quorum":false')
        digest = entry_hash(height, kind, number, content, forger.head)
        if sealed:
            seal = forger.seal(height, kind, number, digest, wall, signatures)
        database.execute(
            "UPDATE entries SET content = ?, previous = ?, hash = ?, seal = ? WHERE height = ?",
            (content, forger.head, digest, seal, height),
        )
        forger.follow(digest, seal)
    if sealed:
        forger.write_checkpoint()
    return f"from entry {first}, {'resealed' if sealed else 'with the old seals'}"


def _unsign(folder: Path, database: sqlite3.Connection, chance: random.Random) -> str:
    """A node's signature is gone, or is that of another update."""
    height = chance.randrange(SMALL)
    (text,) = database.execute(f"SELECT signatures FROM entries WHERE height = {height}").fetchone()
    found: dict[str, Any] = json.loads(text)
    blob = chance.choice(sorted(found))
    other = chance.choice([None, *(found[b] for b in found if b != blob)])
    found.pop(blob)
    if other is not None:
        found[blob] = other
    database.execute(
        "UPDATE entries SET signatures = ? WHERE height = ?", (canonical(found), height)
    )
    return f"{blob[:12]} of entry {height}"


def _swap(database: sqlite3.Connection, one: int, two: int, columns: tuple[str, ...]) -> None:
    names = ", ".join(("hash", *columns))
    rows = {
        height: database.execute(f"SELECT {names} FROM entries WHERE height = {height}").fetchone()
        for height in (one, two)
    }
    # Hashes are unique, so both give theirs up first.
    database.execute(f"UPDATE entries SET hash = height WHERE height IN ({one}, {two})")
    for height, other in ((two, one), (one, two)):
        new = dict(zip(columns, rows[other][1:], strict=True))
        new = {"hash": rows[height][0]} | new
        for column, value in new.items():
            text = value if isinstance(value, int) else value.decode()
            database.execute(f"UPDATE entries SET {column} = ? WHERE height = {height}", (text,))


def main(
    entries: Annotated[int, typer.Option(min=1, help="Of the ledger that is walked.")] = 10_000,
    mutations: Annotated[int, typer.Option(min=0)] = 1000,
    seed: int = 0,
) -> None:
    """Time a walk over a ledger, change another at random, and print what the walk found."""
    console = table_console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        key = fill(folder / "large", entries)
        written = time.perf_counter() - started
        ledger = Ledger(folder / "large")
        started, processor = time.perf_counter(), time.process_time()
        problems = ledger.verify(key=key)
        walked, worked = time.perf_counter() - started, time.process_time() - processor
        ledger.close()
        table = Table("entries", "signed updates", "written", "verified", "CPU of that", "problems")
        table.add_row(
            f"{entries:,}", f"{entries:,}", f"{written:.1f} s", f"{walked:.2f} s",
            f"{worked:.2f} s", str(len(problems)),
        )  # fmt: skip
        console.print(table)
        made, missed = survey(mutations, seed, folder / "small")
    lost = Counter(mutation.kind for mutation in missed)
    table = Table("mutation", "made", "found")
    for kind, count in sorted(made.items()):
        table.add_row(kind, str(count), str(count - lost[kind]))
    table.add_row("all", str(made.total()), str(made.total() - lost.total()))
    console.print(table)
    for mutation in missed:
        console.print(f"not found: {mutation.kind}: {mutation.done}")
    raise typer.Exit(1 if missed or problems else 0)


if __name__ == "__main__":
    typer.run(main)
