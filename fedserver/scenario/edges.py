"""One edge aggregator of a scenario: which nodes it asks and sums on the way to the server."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedserver.scenario.table import Several, Table

NodeName = Annotated[str, Field(min_length=1, max_length=64)]


class EdgeConfiguration(Table):
    """Sums of sums are exact, so edges are no part of a run's identity.

    One is rounded on the way: a LoRA stack of more rank than its matrix has dimensions is cut to that.
    """

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    nodes: Several[NodeName] = Field(min_length=1, description="names of the nodes behind it")


def check_edges(edges: tuple[EdgeConfiguration, ...], names: list[str]) -> None:
    """Every node behind one edge at most, and no name twice. Raises ValueError."""
    taken, behind = set(names), set[str]()
    for edge in edges:
        if edge.name in taken:
            raise ValueError(f"edges: name {edge.name!r} is used twice")
        taken.add(edge.name)
        for node in edge.nodes:
            if node not in names:
                raise ValueError(f"edge {edge.name!r}: there is no node {node!r}")
            if node in behind:
                raise ValueError(f"edge {edge.name!r}: node {node!r} is behind an edge already")
            behind.add(node)
