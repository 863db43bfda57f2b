"""How nodes of unlike strands are asked to train, and what is said of weights that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from aggregators import Layout
from aggregators.messages import Capabilities, Report
from aggregators.methods import LoraMethod, ProjectedMethod, SketchMethod, ZerothOrderMethod
from aggregators.presets import STRANDS
from fedserver.configuration import ConfigurationError, parse, to_toml
from fedserver.outcome import unlike_weights
from fedserver.planner import check_targets, make_plan

LAYOUT = Layout({"a.q_proj.weight": (8, 6), "a.down_proj.weight": (4, 8), "norm.weight": (6,)})
MIXED: dict[str, Any] = {
    "preset": "mixed",
    "learning_rate": 0.01,
    "local_steps": 7,
    "zeroth_order": {"learning_rate": 1e-6, "pool_size": 32, "local_steps": 90},
    "projected": {"learning_rate": 1e-5, "coordinates": 50, "basis": "random"},
    "nodes": [
        {"name": "a"},
        {"name": "b", "strand": "zeroth-order", "local_steps": 5},
        {"name": "c", "strand": "projected", "learning_rate": 0.5},
    ],
}


def plan_of(configuration: Any, node: str, round_number: int = 1) -> Any:
    capabilities = Capabilities(
        node=node, examples=1, held_out=1, rank_limit=64, base_digest="0" * 64,
        layout_json=LAYOUT.to_json(), threads=1, memory_bytes=1, device="cpu", versions={},
    )  # fmt: skip
    return make_plan(
        configuration, capabilities, round_number=round_number, layout=LAYOUT, base_digest="0" * 64
    )


def test_each_node_has_the_method_and_the_pace_of_its_strand() -> None:
    found = parse(MIXED)
    a, b, c = (plan_of(found, name) for name in "abc")
    assert [type(p.method) for p in (a, b, c)] == [LoraMethod, ZerothOrderMethod, ProjectedMethod]
    assert [p.learning_rate for p in (a, b, c)] == [0.01, 1e-6, 0.5]
    assert [p.local_steps for p in (a, b, c)] == [7, 5, 7]
    assert sum(c.method.coordinates.values()) == 50
    assert set(c.method.coordinates) == {spec.name for spec in LAYOUT}


def test_the_pool_stays_and_projections_rotate() -> None:
    found = parse(MIXED)
    seeds = [
        [plan_of(found, name, number).method.master_seed for number in (1, 2)] for name in "bc"
    ]
    assert seeds[0][0] == seeds[0][1]
    assert seeds[1][0] != seeds[1][1]


@pytest.mark.parametrize(
    ("preset", "method"),
    [
        ("fedkseed", ZerothOrderMethod),
        ("ferret", ProjectedMethod),
        ("braid-projected", SketchMethod),
    ],
)
def test_a_preset_of_one_strand_is_of_all_nodes(preset: str, method: type) -> None:
    nodes = [{"name": "a"}, {"name": "b"}]
    found = parse({"preset": preset, "nodes": nodes, "projected": {"coordinates": 40}})
    assert all(type(plan_of(found, name).method) is method for name in "ab")
    other = {"name": "c", "strand": "lora"}
    with pytest.raises(ConfigurationError, match="use preset 'mixed'"):
        parse({"preset": preset, "nodes": [*nodes, other]})


@pytest.mark.parametrize(
    ("projected", "words"),
    [
        ({"scale": "unbiased"}, "error_feedback = false"),
        ({"optimiser": "sgd", "gradient_rank": 4}, "adamw"),
        ({"basis": "adaptiv"}, "basis"),
    ],
)
def test_projections_that_cannot_work_are_refused(projected: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse({**MIXED, "projected": projected})


@pytest.mark.parametrize(
    ("projected", "words"),
    [
        ({"basis": "random", "coordinates": 2}, "coordinates"),
        ({"target_modules": ["nothing"]}, "target_modules"),
    ],
)
def test_projections_of_no_tensor_are_refused_before_the_run(
    projected: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check_targets(parse({**MIXED, "lora_r": 2, "projected": projected}), LAYOUT)


@pytest.mark.parametrize(
    ("zeroth_order", "words"),
    [
        ({"target_modules": ["nothing"]}, "match no weight"),
        ({"layers": [3, 9]}, "match no weight"),
        ({"estimator": "block-wise", "blocks": 9}, "9 blocks of 3 layers"),
        ({"estimator": "hybrid", "cut": 4}, "no layer on one side"),
    ],
)
def test_zeroth_order_training_of_nothing_is_refused_before_the_run(
    zeroth_order: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check_targets(parse({**MIXED, "lora_r": 2, "zeroth_order": zeroth_order}), LAYOUT)


@pytest.mark.parametrize(
    "changes",
    [
        {"zeroth_order": {"trains": "lora", "target_modules": ["q_proj", "embed_tokens"]}},
        {"lora_target_modules": ["embed_tokens"]},
    ],
)
def test_factors_of_an_embedding_are_refused_before_the_run(changes: dict[str, Any]) -> None:
    layout = Layout({"model.embed_tokens.weight": (9, 6)} | {s.name: s.shape for s in LAYOUT})
    with pytest.raises(ConfigurationError, match=r"target_modules: .*embed_tokens") as refused:
        check_targets(parse({**MIXED, "lora_r": 2, **changes}), layout)
    assert len(str(refused.value).splitlines()) == 1
    # Whole weights of an embedding do train.
    whole = {"zeroth_order": {"target_modules": ["embed_tokens"]}}
    check_targets(parse({**MIXED, "lora_r": 2, **whole}), layout)


@pytest.mark.parametrize(
    ("zeroth_order", "words"),
    [
        ({"layers": [3, 3]}, "counts from 0"),
        ({"estimator": "block-wise", "blocks": 4, "pool_size": 3}, "no seed for some"),
        ({"estimator": "sparse", "density": 0.0}, "density"),
        ({"sampling": "magnitude", "clip": None}, "clip"),
        ({"cut": 3}, "leave it out"),
        ({"estimator": "hybrid", "trains": "lora"}, "leave trains"),
        ({"estimator": "hybrid", "layers": [0, 1]}, "leave trains"),
        ({"trains": "prefix"}, "'weights' or 'lora'"),
    ],
)
def test_zeroth_order_settings_that_cannot_work_are_refused(
    zeroth_order: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse({**MIXED, "zeroth_order": zeroth_order})


@pytest.mark.parametrize(
    ("weights", "nodes", "changes", "refused"),
    [
        ({"lora": 0.0}, [{"name": "a"}], {}, True),
        ({"lora": 0.0}, [{"name": "a"}, {"name": "b", "strand": "projected"}], {}, False),
        ({"lora": 0.0}, [{"name": "a"}, {"name": "b", "strand": "auto"}], {}, False),
        (dict.fromkeys(STRANDS, 0.0), [{"name": "a", "strand": "auto"}], {}, True),
        ({"zeroth-order": 0.0}, [{"name": "a", "strand": "zeroth-order"}], {}, True),
        (
            {"zeroth-order": 0.0},
            [{"name": "a", "strand": "zeroth-order"}],
            {"zeroth_order": {"estimator": "hybrid"}},
            False,
        ),
    ],
)
def test_a_run_in_which_nothing_counts_is_refused(
    weights: Any, nodes: Any, changes: Any, refused: bool
) -> None:
    values = {"preset": "mixed", "nodes": nodes, "mixing": {"weights": weights}, **changes}
    if not refused:
        parse(values)
        return
    with pytest.raises(ConfigurationError, match=r"mixing\.weights") as caught:
        parse(values)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mixed_scenario_survives_its_toml() -> None:
    import tomllib

    found = parse({**MIXED, "mixing": {"rule": "add", "weights": {"zeroth-order": 0.5}}})
    assert parse(tomllib.loads(to_toml(found))) == found


@dataclass
class Admitted:
    report: Report


@dataclass
class Row:
    plan: Any
    admitted: Admitted | None


def test_weights_that_differ_are_named() -> None:
    found = parse({**MIXED, "nodes": [{"name": name, "strand": "lora"} for name in "abcd"]})
    rows: list[Any] = [
        Row(plan_of(found, name), Admitted(Report(examples=1, weights=digest * 64)))
        for name, digest in zip("abc", "fef", strict=True)
    ]
    rows.append(Row(plan_of(found, "d"), None))
    (said,) = unlike_weights(rows)
    assert said.startswith("b's weights eeee")
    assert "ffff" in said
    assert unlike_weights([rows[0], rows[2], rows[3]]) == []
    # Of two nodes neither is the one that is wrong.
    (said,) = unlike_weights(rows[:2])
    assert "a ffff" in said
    assert "b eeee" in said
    assert "1 nodes" not in said


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"base_format": "nf4"}, "projected nodes train whole weights"),
        ({"zeroth_order": {"probe": "rademacher"}}, "zeroth_order.probe"),
        ({"projected": {"basis": "random"}}, "projected.probe"),
    ],
)
def test_what_cannot_be_seen_on_a_quantised_base_is_refused(
    changes: dict[str, Any], word: str
) -> None:
    nodes = [
        {"name": "a", "base_format": "nf4"},
        {"name": "b", "strand": "zeroth-order"},
        {"name": "c", "strand": "projected"},
    ]
    parse({"preset": "mixed", "nodes": nodes})
    with pytest.raises(ConfigurationError, match=word) as refused:
        parse({"preset": "mixed", "nodes": nodes, **changes})
    assert len(str(refused.value).splitlines()) == 1


def test_a_node_holds_the_base_as_its_entry_says_else_as_the_run_does() -> None:
    nodes = [{"name": "a"}, {"name": "b", "base_format": "full"}]
    found = parse({"preset": "mixed", "base_format": "int4", "nodes": nodes})
    assert [plan_of(found, name).base_format for name in "ab"] == ["int4", "full"]
