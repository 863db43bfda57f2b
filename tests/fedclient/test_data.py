"""A node's data: partitions, what is held out, token ids, batches."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedclient import data, prompts
from fedclient.base_model import LoadedModel
from fedclient.data import DataError, DataSpec, Tokens, batches, eval_batches, load_partition
from fedclient.loss import IGNORED

PARTITIONS = ("categories", "category", "dirichlet", "iid", "shards")
CATEGORIES = ("red", "green", "blue", "grey")


@st.composite
def divided(draw: st.DrawFn) -> tuple[list[tuple[str, str]], DataSpec]:
    """Draw (question, category) rows with many repeated questions, and a way to divide them."""
    words = st.sampled_from([f"Question {n}?" for n in range(draw(st.integers(3, 30)))])
    rows = draw(st.lists(st.tuples(words, st.sampled_from(CATEGORIES)), min_size=8, max_size=60))
    partition = draw(st.sampled_from(PARTITIONS))
    nodes = draw(st.integers(1, 4))
    known = sorted({category for _, category in rows})
    lists = st.lists(st.sampled_from(known), min_size=1, max_size=len(known), unique=True)
    specification = DataSpec(
        source="replaced",
        partition=partition,
        nodes=nodes,
        seed=draw(st.integers(0, 2**40)),
        alpha=draw(st.sampled_from([0.1, 1.0])),
        held_out=draw(st.sampled_from([0.01, 0.1, 0.5])),
        held_out_max=draw(st.sampled_from([1, 4, 64])),
        limit_per_node=draw(st.sampled_from([None, 3])),
        key="topic",
        categories=tuple(tuple(draw(lists)) for _ in range(nodes))
        if partition == "categories"
        else None,
    )
    return rows, specification


@settings(max_examples=60)
@given(divided())
def test_held_out_questions_are_in_no_nodes_training_set(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[list[tuple[str, str]], DataSpec],
) -> None:
    rows, specification = case
    path = numbered_rows(tmp_path_factory.mktemp("divided"), rows)
    specification = specification.model_copy(update={"source": str(path)})
    trained: set[str] = set()
    held: set[str] = set()
    for index in range(specification.nodes):
        try:
            own = load_partition(specification, index)
        except DataError:
            continue  # too few examples for so many nodes
        assert own.train
        assert own.held_out
        assert len(own.held_out) <= specification.held_out_max
        assert len(own.train) <= (specification.limit_per_node or len(rows))
        assert load_partition(specification, index) == own
        trained |= {example.question for example in own.train}
        held |= {example.question for example in own.held_out}
    assert not trained & held


def numbered_rows(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """A file of (question, category) rows with an answer of their own each."""
    path = folder / "rows.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"question": question, "answer": f"answer {n}", "topic": category})
            for n, (question, category) in _with_first_place(rows)
        )
    )
    return path


@settings(max_examples=40)
@given(divided())
def test_rows_that_repeat_learnt_ones_are_known(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[list[tuple[str, str]], DataSpec],
) -> None:
    rows, specification = case
    path = numbered_rows(tmp_path_factory.mktemp("repeats"), [*rows, *rows])
    for split in ("questions", "pairs", "rows"):
        one = specification.model_copy(update={"source": str(path), "split": split})
        for index in range(one.nodes):
            try:
                own = load_partition(one, index)
            except DataError:
                continue
            learnt = {e.messages for e in own.train}
            assert own.repeats() == [e.messages in learnt for e in own.held_out]
            assert split == "rows" or not any(own.repeats())


def _with_first_place(
    rows: list[tuple[str, str]],
) -> list[tuple[int, tuple[str, str]]]:
    """Rows with the place where an equal one stood first: what repeats has one answer."""
    return [(rows.index(row), row) for row in rows]


def answers(examples: list[data.Example]) -> list[str]:
    return [example.messages[-1][1] for example in examples]


@settings(max_examples=60)
@given(divided())
def test_a_pair_is_learnt_or_held_out_and_none_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[list[tuple[str, str]], DataSpec],
) -> None:
    rows, specification = case
    path = numbered_rows(tmp_path_factory.mktemp("pairs"), [*rows, *rows[: len(rows) // 2]])
    specification = specification.model_copy(
        update={"source": str(path), "split": "pairs", "limit_per_node": None, "held_out_max": 999}
    )
    trained: list[str] = []
    held: list[str] = []
    for index in range(specification.nodes):
        try:
            own = load_partition(specification, index)
        except DataError:
            return  # too few examples for so many nodes
        trained += answers(own.train)
        held += answers(own.held_out)
    assert not set(trained) & set(held)
    # Shards are of one size: fewer rows than there are shards are nobody's. Nodes name some categories.
    if specification.partition in ("iid", "category", "dirichlet"):
        assert len(trained + held) == len(rows) + len(rows) // 2


@settings(max_examples=30)
@given(divided(), st.integers(1, 64))
def test_what_is_learnt_of_whole_questions_does_not_depend_on_how_many_are_evaluated(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[list[tuple[str, str]], DataSpec],
    other: int,
) -> None:
    rows, specification = case
    path = numbered_rows(tmp_path_factory.mktemp("questions"), rows)
    one = specification.model_copy(update={"source": str(path)})
    two = one.model_copy(update={"held_out_max": other})
    for index in range(one.nodes):
        try:
            found = load_partition(one, index), load_partition(two, index)
        except DataError:
            continue
        assert found[0].train == found[1].train


sizes_of_categories = st.lists(st.integers(4, 30), min_size=2, max_size=9)


@settings(max_examples=40)
@given(st.data(), sizes_of_categories, st.randoms(use_true_random=False))
def test_all_categories_are_spread_over_the_nodes(
    tmp_path_factory: pytest.TempPathFactory,
    draw: st.DataObject,
    sizes: list[int],
    chance: random.Random,
) -> None:
    nodes = draw.draw(st.integers(1, len(sizes)))
    rows = [(f"{c} {n}?", f"topic {c}") for c, size in enumerate(sizes) for n in range(size)]
    folder = tmp_path_factory.mktemp("categories")
    specification = DataSpec(
        source=str(numbered_rows(folder, rows)),
        partition="category",
        nodes=nodes,
        split="pairs",
        key="topic",
    )
    parts = [load_partition(specification, index) for index in range(nodes)]
    found = [[e.category for e in (*part.train, *part.held_out)] for part in parts]
    assert sorted(c for own in found for c in own) == sorted(category for _, category in rows)
    assert sum(len(set(own)) for own in found) == len(sizes)  # each whole at one node
    if nodes == len(sizes):
        assert [set(own) for own in found] == [{f"topic {c}"} for c in range(nodes)]
    # No node could give away its smallest category and still have more rows than another.
    loads = [len(own) for own in found]
    smallest = [min(own.count(c) for c in set(own)) for own in found]
    assert all(
        load - least <= other
        for load, least in zip(loads, smallest, strict=True)
        for other in loads
    )
    # It is a matter of the categories' sizes, not of the order of the rows.
    chance.shuffle(rows)
    numbered_rows(folder, rows)
    again = [load_partition(specification, index) for index in range(nodes)]
    assert [sorted(e.question for e in (*p.train, *p.held_out)) for p in again] == [
        sorted(e.question for e in (*p.train, *p.held_out)) for p in parts
    ]


@pytest.mark.parametrize("partition", ["category", "dirichlet", "iid", "shards"])
def test_partitions_cover_everything_once(partition: str, tiny_data_file: Path) -> None:
    specification = DataSpec.model_validate(
        {"source": str(tiny_data_file), "partition": partition, "nodes": 6, "alpha": 5.0}
    )
    parts = [load_partition(specification, index) for index in range(6)]
    found = [e.question for part in parts for e in (*part.train, *part.held_out)]
    assert len(found) == len(set(found)) == 120
    assert len({part.fingerprint for part in parts}) == 6
    if partition == "category":
        for part in parts:
            assert len({e.category for e in (*part.train, *part.held_out)}) == 1


def test_no_bar_is_drawn(tiny_data_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_partition(DataSpec(source=str(tiny_data_file), partition="category", nodes=6), 2)
    assert capfd.readouterr() == ("", "")


def test_categories_go_where_they_are_listed(tiny_data_file: Path) -> None:
    specification = DataSpec(
        source=str(tiny_data_file),
        partition="categories",
        nodes=2,
        categories=(("rivers", "tools"), ("animals",)),
    )
    found = [
        {e.category for part in (own.train, own.held_out) for e in part}
        for own in (load_partition(specification, index) for index in range(2))
    ]
    assert found == [{"rivers", "tools"}, {"animals"}]


def test_an_unknown_category_names_the_nearest(tiny_data_file: Path) -> None:
    specification = DataSpec(
        source=str(tiny_data_file), partition="categories", categories=(("rivrs",),)
    )
    with pytest.raises(DataError, match="did you mean 'rivers'"):
        load_partition(specification, 0)
    unlike = specification.model_copy(update={"categories": (("xyzzy",),)})
    with pytest.raises(DataError, match="animals, cities, colours, numbers, rivers, tools"):
        load_partition(unlike, 0)


def test_too_many_nodes_for_the_categories(tiny_data_file: Path) -> None:
    with pytest.raises(DataError, match="6 categories"):
        load_partition(DataSpec(source=str(tiny_data_file), partition="category", nodes=7), 0)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_too_few_examples_for_the_nodes(partition: str, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(['{"question": "q", "answer": "a"}'] * 3))
    specification = DataSpec.model_validate(
        {"source": str(path), "partition": partition, "nodes": 3}
    )
    with pytest.raises(DataError):
        load_partition(specification, 0)


def test_one_question_cannot_be_both_learnt_and_held_out(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": "Q ", "answer": "b"}')
    with pytest.raises(DataError, match="too few"):
        load_partition(DataSpec(source=str(path)), 0)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_node_without_a_part(index: int, tiny_data_file: Path) -> None:
    with pytest.raises(DataError, match="2 nodes"):
        load_partition(DataSpec(source=str(tiny_data_file), nodes=2), index)


@pytest.mark.parametrize(
    "wrong", [{"nodes": 0}, {"held_out": 0}, {"held_out": 1}, {"alpha": 0}, {"sauce": "x"}]
)
def test_impossible_specifications(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataSpec.model_validate(wrong)


token_lists = st.lists(
    st.integers(2, 12).flatmap(
        lambda n: st.builds(
            Tokens, st.lists(st.integers(0, 5), min_size=n, max_size=n), st.integers(0, n - 1)
        )
    ),
    min_size=1,
    max_size=9,
)


@given(token_lists, st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**62))
def test_batches_are_functions_of_their_arguments(
    tokens: list[Tokens], size: int, steps: int, seed: int
) -> None:
    random.seed(1)
    torch.manual_seed(1)
    first = list(batches(tokens, size, steps, seed, pad_id=0))
    random.seed(2)
    torch.manual_seed(2)
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    second = list(batches(tokens, size, steps, seed, pad_id=0))
    assert random.getstate() == random_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert len(first) == len(second) == steps
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert len(one["input_ids"]) == min(size, len(tokens))


def test_an_epoch_sees_everything_once() -> None:
    tokens = [Tokens([n, n], 1) for n in range(12)]
    seen = [int(row[0]) for batch in batches(tokens, 4, 6, 9, 0) for row in batch["input_ids"]]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


@given(token_lists, st.integers(1, 5), st.integers(0, 5))
def test_masks_and_labels_go_by_length(tokens: list[Tokens], size: int, pad: int) -> None:
    """Token 0..5 may all be the pad token: what is padding is a matter of length alone."""
    found = []
    for batch in eval_batches(tokens, size, pad):
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            length = int(mask.sum())
            begin = int((labels != IGNORED).nonzero()[0])
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert ids[length:].eq(pad).all()
            assert labels[:begin].eq(IGNORED).all()
            assert torch.equal(labels[begin:length], ids[begin:length])
            assert labels[length:].eq(IGNORED).all()
            found.append(Tokens(ids[:length].tolist(), begin))
    key = lambda t: (t.ids, t.labels_from)  # noqa: E731
    assert sorted(found, key=key) == sorted(tokens, key=key)


def test_the_end_token_is_learnt_although_it_pads(tiny: LoadedModel) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = [
        data.Example((("user", question), ("assistant", answer)), "")
        for question, answer in (("a?", "b"), ("a longer question?", "a longer answer"))
    ]
    tokens = data.tokenise(examples, tokenizer, 64)
    (batch,) = eval_batches(tokens, 2, tokenizer.pad_token_id)
    for labels, mask, example in zip(
        batch["labels"], batch["attention_mask"], examples, strict=True
    ):
        learnt = labels[labels != IGNORED].tolist()
        assert learnt[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learnt[:-1]) == example.messages[-1][1]
        assert int(mask.sum()) < mask.numel() or example is examples[1]


@given(
    st.text(min_size=1, max_size=60),
    st.text(min_size=1, max_size=60),
    st.integers(2, 96),
)
def test_what_is_too_long_is_cut(
    tiny_model_folder: Path, question: str, answer: str, max_length: int
) -> None:
    from fedclient import base_model

    tokenizer = base_model.load(str(tiny_model_folder)).tokenizer
    example = data.Example((("user", question), ("assistant", answer)), "")
    (found,) = data.tokenise([example], tokenizer, max_length)
    (whole,) = data.tokenise([example], tokenizer, 10_000)
    prompt, learnt = whole.ids[: whole.labels_from], whole.ids[whole.labels_from :]
    assert prompt == prompts.prompt_ids(example, tokenizer)
    assert len(found.ids) == min(max_length, len(whole.ids))
    kept, cut = found.ids[: found.labels_from], found.ids[found.labels_from :]
    assert kept
    assert prompt[-len(kept) :] == kept
    assert cut
    assert learnt[: len(cut)] == cut
    assert len(kept) >= min(len(prompt), max_length // 2)
