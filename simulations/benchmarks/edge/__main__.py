"""What a deployed server withstands at its edge.

    python -m simulations.benchmarks.edge

Starts a real server (nginx, SuperLink, SuperExec, gatekeeper) on loopback, lets three devices join, and
attacks it for a minute or two: routes without credentials, large bodies, slow sockets, replays.
Ends with 1 if a bound is not kept.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from simulations.benchmarks.edge.large_body import send_large_bodies
from simulations.benchmarks.edge.replays import replay_request, replay_token
from simulations.benchmarks.edge.routes import open_routes
from simulations.benchmarks.edge.server import running_server
from simulations.benchmarks.edge.slow_sockets import hold_sockets
from simulations.benchmarks.tables import table_console

MEGABYTE = 1 << 20
GROWTH_LIMIT, CUT_LIMIT, LATENCY_LIMIT = 32 * MEGABYTE, 30.0, 1.0


def main(
    sockets: Annotated[int, typer.Option(help="Slow sockets at once.")] = 500,
    replays: Annotated[int, typer.Option(help="Replays of a signed request.")] = 1000,
    megabytes: Annotated[int, typer.Option(help="Size of a large body.")] = 1024,
) -> None:
    """Attack a server of our own on loopback and print what it withstood."""
    table = Table("attack", "what came of it", "bound", "")
    sound = []

    def add(attack: str, outcome: str, bound: str, kept: bool) -> None:
        table.add_row(attack, outcome, bound, "kept" if kept else "[red]BROKEN[/red]")
        sound.append(kept)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running_server(folder / "server") as server:
            honest, other = (server.enrol(name, folder / name) for name in ("honest", "other"))
            made, answered = open_routes(server)
            add(
                "no credentials",
                f"{made - len(answered)} of {made} requests refused {answered or ''}",
                "all but health: 401, 403, 404",
                not answered,
            )
            large = send_large_bodies(server, other, megabytes * MEGABYTE)
            add(
                f"bodies of {megabytes} MB",
                f"{', '.join(f'{k}: {v}' for k, v in large.statuses.items())};"
                f" {large.sent // MEGABYTE} MB sent in all, memory {large.growth / MEGABYTE:+.1f} MB",
                f"413, memory at most +{GROWTH_LIMIT // MEGABYTE} MB",
                set(large.statuses.values()) == {413} and large.growth <= GROWTH_LIMIT,
            )
            slow = hold_sockets(server, honest, other, sockets)
            add(
                f"{sockets} slow sockets",
                f"last cut after {max(slow.lifetimes):.1f} s; honest node: {len(slow.latencies)}"
                f" requests, {slow.failures} failed, p99 {slow.p99 * 1000:.0f} ms",
                f"{CUT_LIMIT:.0f} s, p99 {LATENCY_LIMIT:.0f} s",
                max(slow.lifetimes) <= CUT_LIMIT
                and slow.p99 <= LATENCY_LIMIT
                and not slow.failures,
            )
            again = replay_request(server, other, replays)
            add(
                "signed request replayed",
                f"{again[401]} of {replays} refused (401)",
                "all",
                again == {401: replays},
            )
            token = server.invite("late")
            server.enrol_with(token, folder / "late")
            tokens = replay_token(server, token, replays)
            add(
                "token replayed",
                ", ".join(f"{count} {kind}" for kind, count in tokens.items()),
                "all refused (used-token, or 503 by rate)",
                not tokens.keys() - {"used-token", "503"},
            )
    table_console().print(table)
    raise typer.Exit(0 if all(sound) else 1)


if __name__ == "__main__":
    typer.run(main)
