"""A node's data: its partition of a source, what it holds out, and batches of token ids.

Dividing is done by flwr-datasets' partitioners. What is held out is held out everywhere: its hash
decides, so no held-out question, or with the split "pairs" no held-out question with that answer, is in
any node's training set. The split "rows" is for sources that repeat themselves.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedclient import foreign_bars
from fedclient.loss import IGNORED
from fedclient.prompts import answer_ids, prompt_ids
from fedclient.records import DataError, Example, read_examples

__all__ = ["DataError", "DataSpec", "Example", "NodeData", "Tokens", "batches", "eval_batches",
           "load_partition", "tokenise"]  # fmt: skip

Batch = dict[str, Tensor]
HASH_RANGE = float(1 << 64)


class DataSpec(BaseModel):
    """Where data come from and how they are divided. ``categories``: for each node, its list.

    ``partition`` "category": one category a node; where there are more, each goes whole to the node
    with the fewest rows, the largest first. "categories": those that ``categories`` lists.

    ``split`` "questions" holds out whole questions; "pairs" holds out questions with one answer, and
    the same question may be learnt with another; "rows" holds out single rows, and an equal row may be
    learnt, as in a source that repeats itself: see ``NodeData.repeats``.

    A node evaluates at most ``held_out_max`` examples; what its share holds out beyond that it does not
    train on: another node, maybe a device whose data nobody else sees, may evaluate the same. Choose a
    smaller ``held_out`` to train on more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "chatterbot"
    partition: Literal["categories", "category", "dirichlet", "iid", "shards"] = "iid"
    key: str | None = None
    alpha: float = Field(default=0.5, gt=0)
    categories: tuple[tuple[str, ...], ...] | None = None
    nodes: int = Field(default=1, ge=1)
    split: Literal["questions", "pairs", "rows"] = "questions"
    held_out: float = Field(default=0.1, gt=0, lt=1)
    held_out_max: int = Field(default=64, ge=1)
    limit_per_node: int | None = Field(default=None, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class NodeData:
    """What one node trains on and what it only evaluates on; disjoint by ``DataSpec.split``."""

    train: list[Example]
    held_out: list[Example]
    fingerprint: str

    def repeats(self) -> list[bool]:
        """For each held-out example, whether the node trains on the same question and answer."""
        learnt = {(example.question, example.answer) for example in self.train}
        return [(example.question, example.answer) in learnt for example in self.held_out]


@dataclass(frozen=True)
class Tokens:
    """Token ids of one example; the answer, which is what is learnt, begins at ``labels_from``."""

    ids: list[int]
    labels_from: int


def load_partition(spec: DataSpec, index: int) -> NodeData:
    """The data of node ``index``. Raises DataError."""
    examples = read_examples(spec.source, spec.key)
    mine = _part(examples, spec, index)
    # The order within a node is by content and seed: a source's own order is often by topic.
    numbered = sorted(_numbered(mine), key=lambda pair: _hash(spec.seed, "order", *pair))
    held = [_is_held_out(copy, example, spec) for copy, example in numbered]
    ordered = [example for _, example in numbered]
    if not any(held):
        elsewhere = _questions_elsewhere(examples, mine, spec, index)
        own = {e.question for e in ordered} - elsewhere
        if own:
            lowest = min(own, key=lambda question: _hash(spec.seed, "held", question))
            held = [e.question == lowest for e in ordered]
    train = [e for e, is_held in zip(ordered, held, strict=True) if not is_held]
    held_out = [e for e, is_held in zip(ordered, held, strict=True) if is_held]
    held_out = held_out[: spec.held_out_max]
    if spec.limit_per_node is not None:
        train = train[: spec.limit_per_node]
    if not train or not held_out:
        raise DataError(
            f"{spec.source}: node {index} gets {len(mine)} examples, too few to train and to hold"
            " some out; use fewer nodes or another partition"
        )
    summed = hashlib.sha256()
    for part in (train, held_out):
        summed.update(repr([(e.messages, e.category) for e in part]).encode())
    return NodeData(train, held_out, summed.hexdigest())


def tokenise(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Tokens]:
    """Prompt, answer and end of turn of each example. Raises DataError.

    A prompt that is too long loses its beginning, an answer its end; at least half of ``max_length``
    is the prompt's if it needs it. Prompt and answer are tokenised apart, so that the boundary is
    where generation begins.
    """
    found = []
    for example in examples:
        prompt = prompt_ids(example, tokenizer)
        answer = answer_ids(example, tokenizer)
        answer = answer[: max(1, max_length - min(len(prompt), max_length // 2))]
        prompt = prompt[-(max_length - len(answer)) :] if len(answer) < max_length else prompt[-1:]
        found.append(Tokens(prompt + answer, len(prompt)))
    return found


def batches(
    tokens: Sequence[Tokens], batch_size: int, steps: int, seed: int, pad_id: int
) -> Iterator[Batch]:
    """``steps`` training batches, reshuffled every epoch; a function of its arguments alone."""
    chance = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        chosen: list[int] = []
        while len(chosen) < min(batch_size, len(tokens)):
            if not order:
                order = list(range(len(tokens)))
                chance.shuffle(order)
            chosen.append(order.pop())
        yield _collate([tokens[index] for index in chosen], pad_id)


def eval_batches(tokens: Sequence[Tokens], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """All examples once, neighbours of like length together."""
    ordered = sorted(tokens, key=lambda t: (len(t.ids), t.ids))
    for start in range(0, len(ordered), batch_size):
        yield _collate(ordered[start : start + batch_size], pad_id)


def _collate(chosen: Sequence[Tokens], pad_id: int) -> Batch:
    """Right padding, masked by length: the pad token may be the end token, which is learnt."""
    longest = max(len(tokens.ids) for tokens in chosen)
    ids = torch.full((len(chosen), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, tokens in enumerate(chosen):
        values = torch.tensor(tokens.ids)
        ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
        labels[row, tokens.labels_from : len(values)] = values[tokens.labels_from :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _part(examples: list[Example], spec: DataSpec, index: int) -> list[Example]:
    if not 0 <= index < spec.nodes:
        raise DataError(f"node {index} has no part: the data are divided over {spec.nodes} nodes")
    if spec.partition == "categories":
        return _listed(examples, spec, index)
    if len(examples) < 2 * spec.nodes:
        raise DataError(
            f"{spec.source}: {len(examples)} examples are too few for {spec.nodes} nodes, each of"
            " which needs two or more; use fewer nodes"
        )
    if spec.nodes == 1:
        return examples
    from datasets import Dataset
    from flwr_datasets import partitioner as partitioners

    rows = Dataset.from_dict(
        {"row": list(range(len(examples))), "category": [e.category for e in examples]}
    )
    by: Any
    if spec.partition == "iid":
        by = partitioners.IidPartitioner(num_partitions=spec.nodes)
        rows = rows.shuffle(seed=spec.seed % 2**32)
    elif spec.partition == "dirichlet":
        by = partitioners.DirichletPartitioner(
            num_partitions=spec.nodes, partition_by="category", alpha=spec.alpha,
            min_partition_size=2, seed=spec.seed % 2**32,
        )  # fmt: skip
    elif spec.partition == "shards":
        by = partitioners.ShardPartitioner(
            num_partitions=spec.nodes, partition_by="category", num_shards_per_partition=2,
            seed=spec.seed % 2**32,
        )  # fmt: skip
    else:
        sizes = Counter(example.category for example in examples)
        if len(sizes) < spec.nodes:
            raise DataError(
                f"{spec.source}: {len(sizes)} categories cannot serve {spec.nodes} nodes; set data.key"
            )
        if len(sizes) > spec.nodes:
            mine = _spread(sizes, spec.nodes)[index]
            return [example for example in examples if example.category in mine]
        by = partitioners.NaturalIdPartitioner(partition_by="category")
    by.dataset = rows
    try:
        with foreign_bars.hidden(partitioners.natural_id_partitioner), warnings.catch_warnings():
            # One for every draw of a Dirichlet partition that is drawn again, one of pyarrow's.
            warnings.filterwarnings("ignore", "The specified min_partition_size", UserWarning)
            warnings.filterwarnings("ignore", "Specifying null_placement", FutureWarning)
            chosen = by.load_partition(index)["row"]
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{spec.source}: cannot be divided ({spec.partition}): {error}") from None
    return [examples[row] for row in chosen]


def _spread(sizes: Mapping[str, int], nodes: int) -> list[set[str]]:
    """Every category to one node: the largest first, to the node with the fewest rows so far."""
    found: list[set[str]] = [set() for _ in range(nodes)]
    rows = [0] * nodes
    for category in sorted(sizes, key=lambda name: (-sizes[name], name)):
        fewest = rows.index(min(rows))
        found[fewest].add(category)
        rows[fewest] += sizes[category]
    return found


def _listed_elsewhere(spec: DataSpec, index: int) -> set[str]:
    if spec.partition != "categories" or spec.categories is None:
        return set()
    return {c for node, own in enumerate(spec.categories) if node != index for c in own}


def _questions_elsewhere(
    examples: list[Example], mine: list[Example], spec: DataSpec, index: int
) -> set[str]:
    """Questions that other nodes may train on; two nodes may list the same category."""
    if spec.partition == "categories":
        others = _listed_elsewhere(spec, index)
        return {example.question for example in examples if example.category in others}
    held = {id(example) for example in mine}
    return {example.question for example in examples if id(example) not in held}


def _listed(examples: list[Example], spec: DataSpec, index: int) -> list[Example]:
    import difflib

    if spec.categories is None or index >= len(spec.categories) or not spec.categories[index]:
        raise DataError(
            f"{spec.source}: the partition is 'categories', but node {index} lists none; name them"
            " under 'categories'"
        )
    known = {example.category for example in examples}
    wanted = set(spec.categories[index])
    for category in sorted(wanted - known):
        near = difflib.get_close_matches(category, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
        raise DataError(f"{spec.source}: no category {category!r}{hint}")
    return [example for example in examples if example.category in wanted]


def _numbered(examples: Sequence[Example]) -> list[tuple[int, Example]]:
    """Each example with the number of equal ones before it: rows that repeat are told apart."""
    seen: Counter[Example] = Counter()
    found = []
    for example in examples:
        found.append((seen[example], example))
        seen[example] += 1
    return found


def _is_held_out(copy: int, example: Example, spec: DataSpec) -> bool:
    decides: tuple[Any, ...] = (example.question,)
    if spec.split == "pairs":
        decides = (example.question, example.answer)
    elif spec.split == "rows":
        decides = (copy, example.messages)
    return _hash(spec.seed, "held", *decides) / HASH_RANGE < spec.held_out


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
