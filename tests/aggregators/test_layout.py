"""A layout is an order of names and shapes, and its fingerprint says which."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from aggregators import Layout

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=8), st.lists(st.integers(1, 50), max_size=3), max_size=6
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


@given(shapes=SHAPES)
def test_tensors_are_numbered_in_order_and_elements_follow_each_other(shapes):
    layout = Layout(shapes)
    first = 0
    for tensor_id, (spec, (name, shape)) in enumerate(zip(layout, shapes.items(), strict=True)):
        assert (spec.name, spec.shape) == (name, tuple(shape))
        assert (spec.tensor_id, spec.first_element) == (tensor_id, first)
        assert layout.tensor_id(name) == tensor_id
        assert layout.shape(name) == tuple(shape)
        assert name in layout
        first += math.prod(shape)
    assert (layout.elements, len(layout)) == (first, len(shapes))


@given(shapes=SHAPES)
def test_json_round_trip_keeps_the_fingerprint(shapes):
    layout = Layout(shapes)
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.fingerprint == layout.fingerprint


def test_fingerprint_depends_on_names_shapes_and_order():
    layouts = [
        Layout({"a": (2, 3), "b": (4,)}),
        Layout({"b": (4,), "a": (2, 3)}),
        Layout({"a": (3, 2), "b": (4,)}),
        Layout({"a": (2, 3), "c": (4,)}),
        Layout({"a": (2, 3)}),
    ]
    assert len(set(layouts)) == len(layouts)
    assert layouts[0] != "a layout"


def test_fingerprint_stays_what_ledgers_hold():
    assert Layout({"a.weight": (2, 3)}).to_json() == '[["a.weight",[2,3]]]'
    assert Layout({"a.weight": (2, 3)}).fingerprint == (
        "0cfeab6418fbbf3b50d49636b7983c732f8c036d3f58e925891197739d75cd11"
    )


def test_tied_weights_stand_once():
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(5, 3)
    model.norm = torch.nn.LayerNorm(3)
    model.head = torch.nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight
    layout = Layout.from_model(model)
    assert [spec.name for spec in layout] == ["embed.weight", "norm.weight", "norm.bias"]
    assert layout.shape("embed.weight") == (5, 3)


@pytest.mark.parametrize("shapes", [{"": (2,)}, {"a": (0, 3)}, {"a": (2, -1)}])
def test_impossible_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="impossible shape"):
        Layout(shapes)


def test_unknown_names_are_key_errors():
    layout = Layout({"a": (2,)})
    for ask in (layout.shape, layout.tensor_id):
        with pytest.raises(KeyError):
            ask("b")


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "{", '{"a1":0}', '["a1"]', '[["a"]]', '[["a",[1],2]]', '[["a","12"]]',
        '[["a",[1.5]]]', '[["a",[1e999]]]', '[["a",[true]]]', '[["a",["2"]]]', '[[1,[2]]]',
        '[["a",[0]]]', '[["",[1]]]', '[["a",[1]],["a",[1]]]', "[" * 100_000,
    ],
)  # fmt: skip
def test_other_text_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"layout|shape"):
        Layout.from_json(text)


@given(value=JSON | st.lists(st.tuples(st.text(max_size=2), JSON), max_size=3))
@example(value=[["a", [10**30]]])
def test_any_json_is_a_layout_or_a_value_error(value):
    try:
        layout = Layout.from_json(json.dumps(value))
    except ValueError:
        return
    assert json.loads(layout.to_json()) == [list(pair) for pair in value]
