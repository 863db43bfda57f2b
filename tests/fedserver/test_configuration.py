"""A scenario is read strictly: what it resolves to reads back the same, and errors name their remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from aggregators import Layout
from aggregators.messages import Capabilities
from fedserver.configuration import (
    SCENARIO_FOLDER,
    ConfigurationError,
    RunConfiguration,
    load,
    parse,
    scenario_names,
    to_toml,
)
from fedserver.planner import make_plan
from fedserver.scenario.explanation import TABLES

MINIMAL: dict[str, Any] = {"nodes": [{"name": "a"}, {"name": "b"}]}


@pytest.mark.parametrize("name", scenario_names())
def test_every_shipped_scenario_is_valid(name: str) -> None:
    assert load(name).name == name


@given(
    seed=st.integers(0, 2**63 - 1),
    rank=st.integers(1, 64),
    rate=st.floats(1e-6, 1.0),
    description=st.text(max_size=40),
    modules=st.lists(st.text("abcdefgh_.", min_size=1), min_size=1, max_size=3),
    limit=st.none() | st.integers(1, 100),
)
def test_a_resolved_scenario_reads_back_the_same(
    seed: int, rank: int, rate: float, description: str, modules: list[str], limit: int | None
) -> None:
    configuration = parse(
        {
            **MINIMAL,
            "seed": seed,
            "lora_r": rank,
            "learning_rate": rate,
            "description": description,
            "lora_target_modules": modules,
            "data": {"limit_per_node": limit},
        }
    )
    assert parse(_read(to_toml(configuration))) == configuration


def test_the_run_id_ignores_names_places_and_length_and_nothing_else() -> None:
    first = parse(MINIMAL)
    same = parse({**MINIMAL, "name": "other", "output_dir": "x", "rounds": 99})
    assert first.run_id() == same.run_id()
    for change in ({"seed": 1}, {"threads": 1}, {"preset": "flora"}, {"view_rank": 8}):
        assert parse({**MINIMAL, **change}).run_id() != first.run_id()
        copied = first.model_copy(update=change)
        assert copied.run_id() == parse({**MINIMAL, **change}).run_id()
    assert first == parse(MINIMAL)


def test_the_scenario_is_hashed_once_however_many_plans_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed = []
    deciding = RunConfiguration.deciding

    def counted(self: RunConfiguration) -> dict[str, Any]:
        hashed.append(self)
        return deciding(self)

    monkeypatch.setattr(RunConfiguration, "deciding", counted)
    found = parse({"nodes": [{"name": str(number)} for number in range(20)]})
    for node in found.nodes:
        capabilities = Capabilities(
            node=node.name, examples=1, held_out=1, rank_limit=64, base_digest="0" * 64,
            layout_json="[]", threads=1, memory_bytes=1, device="cpu", versions={},
        )  # fmt: skip
        layout = Layout({"m.weight": (2, 2)})
        make_plan(found, capabilities, round_number=1, layout=layout, base_digest="0" * 64)
    assert len(hashed) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_rank": 4}, ["lora_rank", "lora_r"]),
        ({"data": {"sorce": "x"}}, ["data.sorce", "source"]),
        ({"nodes": [{"name": "a", "lora_rr": 2}]}, ["nodes.0.lora_rr", "lora_r"]),
        ({"held_out_max": 4}, ["held_out_max", "data.held_out_max"]),
        ({"preset": "brayd"}, ["brayd", "braid"]),
        ({"lora_r": 0}, ["lora_r", "0"]),
        ({"lora_variant": "dora"}, ["dora", "magnitude"]),
        ({"lora_init": "pissa"}, ["pissa", "base"]),
        ({"nodes": []}, ["nodes"]),
        ({"nodes": [{"name": "a"}, {"name": "a"}]}, ["'a'", "twice"]),
        ({"quorum": 3}, ["quorum 3", "2 nodes"]),
        ({"data": {"partition": "categories"}}, ["categories", "'a'"]),
        ({"learning_rate": float("nan")}, ["learning_rate"]),
        ({"rounds": True}, ["rounds", "whole number", "True"]),
        ({"rounds": "5"}, ["rounds", "whole number", "'5'"]),
        ({"rounds": 5.0}, ["rounds", "whole number", "5.0"]),
        ({"quorum": True}, ["quorum", "number", "True"]),
        ({"lora_alpha": "16"}, ["lora_alpha", "number", "'16'"]),
        ({"evaluate": 1}, ["evaluate", "true or false", "1"]),
        ({"data": {"alpha": True}}, ["data.alpha", "number", "True"]),
        ({"mixing": {"weights": {"lora": "2"}}}, ["mixing.weights.lora", "number", "'2'"]),
        ({"nodes": [{"name": "a", "away": [True]}]}, ["nodes.0.away.0", "whole number", "True"]),
    ],
)
def test_every_mistake_is_named_with_its_remedy(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse({**MINIMAL, **values})
    for word in words:
        assert word in str(caught.value)


def _places(model: type[BaseModel], *where: str) -> list[tuple[str, ...]]:
    found = []
    for key in model.model_fields:
        if not where and key in TABLES:
            continue
        found.append((*where, key))
    return found


PLACES = _places(RunConfiguration) + [
    place for table, model in TABLES.items() for place in _places(model, table)
]
# A scalar of each kind, one out of every range, and what is none.
WRONG = ["?!", "", -1, 0, 2**70, -2.5, 1e400, True, [], [3], ["?!"], {"?!": 1}, 3]


@pytest.mark.parametrize("place", [*PLACES, *[(table,) for table in TABLES]], ids=".".join)
def test_every_wrong_value_is_one_line_in_our_own_words(place: tuple[str, ...]) -> None:
    """Whatever is written at whichever place: accepted, or a line that names the place."""
    refused = 0
    for value in WRONG:
        table, *rest = place
        values: dict[str, Any] = dict(MINIMAL)
        if table == "nodes" and rest:
            values["nodes"] = [{"name": "a"}, {"name": "b", rest[0]: value}]
        else:
            values[table] = {rest[0]: value} if rest else value
        try:
            parse(values)
        except ConfigurationError as error:
            refused += 1
            source, _, line = str(error).partition(": ")
            assert source == "scenario"
            assert "\n" not in line
            assert (rest[0] if rest else table) in line
            for foreign in ("Input should", "valid ", "pydantic", "Value error", "fedbraid schema"):
                assert foreign not in line
    assert refused > 0


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigurationError, match="nodes: missing"):
        parse({})
    with pytest.raises(ConfigurationError, match=r"nodes\.1\.name: missing"):
        parse({"nodes": [{"name": "a"}, {"strand": "lora"}]})


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse({**MINIMAL, "rounds": 0, "seeed": 1})
    assert "rounds" in str(caught.value)
    assert "seeed" in str(caught.value)


def test_overrides_reach_tables_and_nodes_by_name_and_index() -> None:
    changed = load("quickstart", ["rounds=5", "nodes.cafe.lora_r=3", "nodes.0.lora_r=2",
                                  "data.held_out_max=7", "base_model=some/model"])  # fmt: skip
    assert changed.rounds == 5
    assert changed.nodes[5].lora_r == 3
    assert changed.nodes[0].lora_r == 2
    assert changed.data.held_out_max == 7
    assert changed.base_model == "some/model"


@pytest.mark.parametrize("text", ["true", '"5"', "2.5", "five"])
def test_an_override_is_as_strict_as_a_file(text: str) -> None:
    with pytest.raises(ConfigurationError, match="rounds: write a whole number"):
        load("quickstart", [f"rounds={text}"])


def test_whole_numbers_are_numbers_and_lists_are_lists() -> None:
    """What JSON and TOML have no two of: a list is no tuple, and 8 is 8.0 where a number is wanted."""
    changed = load("quickstart", ["lora_alpha=8", "quorum=4/6", "zeroth_order.layers=[0, 2]"])
    assert changed.run_id() == load("quickstart", ["lora_alpha=8.0", "quorum=4/6",
                                                   "zeroth_order.layers=[0, 2]"]).run_id()  # fmt: skip
    again = parse({**changed.model_dump(mode="json"), "nodes": changed.model_dump()["nodes"]})
    assert again == changed


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "2024", "1e3", "0x10", "true", "2024-01-01", "[1]", '"quoted"']
)
def test_an_override_needs_no_quotes_where_a_text_is_wanted(text: str) -> None:
    changed = load("quickstart", [f"base_model={text}", f"nodes.cafe.description={text}"])
    assert changed.base_model == text.strip('"')
    assert changed.nodes[5].description == text.strip('"')


def test_an_override_that_fits_neither_as_toml_nor_as_text_is_refused_as_it_was_read() -> None:
    assert load("quickstart", ["nodes.cafe.fault=nan"]).nodes[5].fault == "nan"
    assert load("quickstart", ["rounds=0x10", "seed=7"]).rounds == 16
    # A later override may still mend what an earlier one breaks.
    assert load("quickstart", ["quorum=7", "nodes.cafe.fault=nan", "quorum=6"]).quorum == 6
    for override in ("learning_rate=nan", "nodes.cafe.fault=inf", "rounds=2.5"):
        with pytest.raises(ConfigurationError, match=override.partition("=")[0].split(".")[-1]):
            load("quickstart", [override])


def test_rslora_keeps_alpha_and_plain_lora_its_ratio_to_the_rank() -> None:
    capabilities = Capabilities(
        node="cafe", examples=1, held_out=1, rank_limit=64, base_digest="0" * 64,
        layout_json="[]", threads=1, memory_bytes=1, device="cpu", versions={},
    )  # fmt: skip
    for rslora, alpha in ((False, 4.0), (True, 16.0)):
        found = load("quickstart", [f"lora_rslora={str(rslora).lower()}", "nodes.cafe.lora_r=2"])
        layout = Layout({"m.weight": (2, 2)})
        plan = make_plan(found, capabilities, round_number=1, layout=layout, base_digest="0" * 64)
        assert plan.lora.alpha == alpha
        assert plan.lora.scale == pytest.approx(alpha / (2**0.5 if rslora else 2))


@pytest.mark.parametrize("override", ["rounds", "nodes.nobody.lora_r=3", "rounds.x=1", "nodes=1"])
def test_an_impossible_override_says_so(override: str) -> None:
    with pytest.raises(ConfigurationError):
        load("quickstart", [override])


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="quickstart"):
        load("quikstart")
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = = 3")
    with pytest.raises(ConfigurationError, match=r"broken\.toml"):
        load(str(broken))


def test_shipped_scenarios_open_with_the_command_that_runs_them() -> None:
    for path in SCENARIO_FOLDER.glob("*.toml"):
        assert path.read_text().startswith(f"# fedbraid simulate {path.stem}")


def test_unlisted_nodes_have_no_entry() -> None:
    configuration = RunConfiguration.model_validate(MINIMAL)
    assert configuration.node("b") is not None
    assert configuration.node("c") is None


def _read(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)
