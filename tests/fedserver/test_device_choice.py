"""A node that leaves its strand open gets the best that its limits allow, or a line with its need."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregators import Layout
from fedserver.configuration import ConfigurationError, RunConfiguration, parse
from fedserver.device_choice import FORMATS, with_choices

SIDE = 512
LAYOUT = Layout(
    {"embed_tokens.weight": (4096, SIDE)}
    | {f"layers.{i}.{part}_proj.weight": (SIDE, SIDE) for i in range(8) for part in "qkvo"}
    | {"norm.weight": (SIDE,)}
)
RICH = 1e6


def scenario(*nodes: dict[str, Any], **changes: Any) -> RunConfiguration:
    named = [{"name": f"n{place}", "strand": "auto"} | node for place, node in enumerate(nodes)]
    return parse(
        {"preset": "mixed", "lora_r": 8, "micro_batch_size": 4, "max_length": 32, "nodes": named}
        | changes
    )


def chosen(*nodes: dict[str, Any], **changes: Any) -> list[tuple[str | None, ...]]:
    found, _ = with_choices(scenario(*nodes, **changes), LAYOUT)
    return [(node.strand, node.base_format, node.lora_r) for node in found.nodes]


def test_without_limits_a_device_trains_lora_on_the_whole_base() -> None:
    assert chosen({}) == [("lora", "full", 8)]


def test_less_and_less_memory() -> None:
    """From the whole base to fewer bits, to forward passes alone; never back."""
    order = []
    for limit in range(120, 10, -2):
        try:
            (found,) = chosen({"memory_limit_mb": limit})
        except ConfigurationError:
            break
        if found not in order:
            order.append(found)
    assert order[0] == ("lora", "full", 8)
    assert order[-1] == ("zeroth-order", "nf4", None)
    strands = [strand for strand, _, _ in order]
    assert strands == sorted(strands)
    assert {base for _, base, _ in order} >= {"full", "nf4"}


def test_a_thin_link_lowers_the_rank_and_then_leaves_scalars() -> None:
    ranks = [chosen({"upload_limit_kb": limit})[0] for limit in (10_000, 400, 200)]
    assert [strand for strand, _, _ in ranks] == ["lora"] * 3
    assert [rank for _, _, rank in ranks] == [8, 4, 2]
    assert chosen({"upload_limit_kb": 6}) == [("zeroth-order", "full", None)]
    link = {"link_mbps": 0.016}  # 200 kB until the deadline
    assert chosen(link, deadline_seconds=100.0)[0][2] == 2


def test_a_device_that_does_not_backpropagate() -> None:
    assert chosen({"backpropagates": False})[0][0] == "zeroth-order"
    with pytest.raises(ConfigurationError, match="backpropagat"):
        with_choices(scenario({"strand": "lora", "backpropagates": False}), LAYOUT)


@given(
    memory=st.none() | st.floats(0.01, 500),
    upload=st.none() | st.floats(0.01, 20_000),
    able=st.booleans(),
    base_format=st.none() | st.sampled_from(FORMATS),
    strand=st.sampled_from(["auto", "lora", "zeroth-order"]),
)
def test_a_choice_is_made_again_and_its_need_is_enough(
    memory: float | None, upload: float | None, able: bool, base_format: Any, strand: str
) -> None:
    """The same twice; what is refused for memory is possible with the memory that the line names."""
    node = {"strand": strand, "memory_limit_mb": memory, "upload_limit_kb": upload,
            "backpropagates": able, "base_format": base_format}  # fmt: skip
    asked = scenario({k: v for k, v in node.items() if v is not None})
    try:
        first = with_choices(asked, LAYOUT)
    except ConfigurationError as error:
        (line,) = str(error).splitlines()
        if "needs" in line and "memory_limit_mb" in line:
            need = float(line.partition("needs ")[2].partition(" MB")[0].replace(",", ""))
            assert memory is not None
            assert need > memory
            enough = {k: v for k, v in node.items() if v is not None} | {"memory_limit_mb": need}
            with_choices(scenario(enough), LAYOUT)
        return
    assert first == with_choices(asked, LAYOUT)
    (found,), reasons = first[0].nodes, first[1]
    assert found.strand in ("lora", "projected", "zeroth-order")
    assert base_format in (None, found.base_format)
    assert set(reasons) == ({"n0"} if strand == "auto" else set())
    assert with_choices(first[0], LAYOUT)[0] == first[0]


def test_probes_that_cannot_stand_beside_fewer_bits_leave_the_whole_base() -> None:
    limited = {"memory_limit_mb": 55}
    assert chosen(limited)[0][1] != "full"
    with pytest.raises(ConfigurationError, match="needs"):
        chosen(limited, zeroth_order={"probe": "rademacher"})
