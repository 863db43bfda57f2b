"""Rank-1 probes beside the layers: the loss at W + a z and at W - a z from one batch, no scratch.

(W + a u vᵀ) x = W x + a (v·x) u, so a probe is one number a row of x and one outer product on the way
to y. Copies of the batch stand one after another in the rows, and each has its own a, hence both halves
of an antithetic pair (or several pairs) share every read of W. Recent steps of the walk are such terms
too, equal for all copies. Weights that hold a walk get them in one pass over the weight every
``PENDING`` steps; beside others (quantised, bfloat16) they become a sign adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fedkernels as fk
from fedclient.beside import beside_of, cut, sign_rows
from fedclient.local.forward import Batch, is_conv1d, predictions, rows_of, streaming_head
from fedclient.local.objectives import Predictions
from fedclient.local.placement import Placed
from fedclient.local.scope import Scope
from fedclient.local.vocabulary import BLOCK, Logits
from fedclient.local.walk import Terms, add_terms, holds_walk, perturbed

PROBE = "rank1"
PENDING = 8
# Positions of a batch are few enough to share a forward pass up to this number of them.
POSITIONS_AT_ONCE = 1024

Forward = Callable[..., Tensor]
Point = tuple[int, float]  # seed, scale: the weights W + scale * z(seed)


class NotPaired(Exception):
    """Why this model's layers cannot take their probes beside them."""


class Rank1Pass:
    """A model whose copies of a batch see probes of their own; ``forwards`` are its layers' stand-ins.

    Raises NotPaired where a tensor of ``placed`` is in a module that is no linear, embedding or norm.
    """

    def __init__(self, model: nn.Module, placed: Sequence[Placed], scope: Scope) -> None:
        self._model, self._scope = model, scope
        self._dtype = next(
            (p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32
        )
        self._copies = self._rows = 1
        self._mixture = torch.zeros(1, 0)
        self._points: Sequence[Point] = [(0, 0.0)]
        self._pending: list[tuple[int, float]] = []
        self._probed: list[int] = []
        self._older: dict[int, float] = {}
        self._matrices: list[_Matrix] = []
        self._vectors: list[_Vector] = []
        self._forwards: dict[nn.Module, Forward] = {}
        self._called: set[nn.Module] = set()
        self._head = streaming_head(model)
        self._head_matrix: _Matrix | None = None
        self._substitute(placed)

    @property
    def forwards(self) -> dict[nn.Module, Forward]:
        """The forward pass that stands in for each module's own."""
        return self._forwards

    def predictions(self, batch: Batch, points: Sequence[Point]) -> list[Predictions]:
        """The model's predictions at every point; the weights stay as they are."""
        positions = batch["input_ids"].numel()
        at_once = max(2, POSITIONS_AT_ONCE // positions)
        found: list[Predictions] = []
        for start in range(0, len(points), at_once):
            found += self._run(batch, points[start : start + at_once])
        return found

    def move(self, terms: Terms) -> None:
        """Move the weights by sum_k amount_k z_k."""
        moving = {seed: amount for seed, amount in terms.items() if amount != 0.0}
        for vector in self._vectors:
            vector.move(moving)
        if list(moving) == self._probed:
            # Its factors stand where the probe's stood.
            self._pending += moving.items()
            self._probed = []
            if len(self._pending) >= PENDING:
                self.settle()
        elif moving:
            self.settle()
            self._fold(moving)

    def settle(self) -> None:
        """Take the pending terms into the weights, or into the adapters beside them."""
        terms: dict[int, float] = {}
        for seed, amount in self._pending:
            add_terms(terms, {seed: amount})
        self._pending, self._probed = [], []
        if terms:
            self._fold(terms)

    def _fold(self, terms: Terms) -> None:
        for matrix in self._matrices:
            matrix.fold(terms)
        if any(not matrix.holds_walk for matrix in self._matrices):
            add_terms(self._older, terms)
            for matrix in self._matrices:
                matrix.stand_beside(self._older)

    def _run(self, batch: Batch, points: Sequence[Point]) -> list[Predictions]:
        seeds = list(dict.fromkeys(seed for seed, scale in points if scale != 0.0))
        if seeds != self._probed:
            for place, seed in enumerate(seeds, start=len(self._pending)):
                for matrix in self._matrices:
                    matrix.write(place, seed)
            self._probed = seeds
        standing = [seed for seed, _ in self._pending] + seeds
        for matrix in self._matrices:
            matrix.stand_among(standing)
        mixture = torch.zeros(len(points), len(self._pending) + len(seeds))
        mixture[:, : len(self._pending)] = torch.tensor([amount for _, amount in self._pending])
        for copy, (seed, scale) in enumerate(points):
            if scale != 0.0:
                mixture[copy, len(self._pending) + seeds.index(seed)] = scale
        self._mixture, self._points, self._copies = mixture, points, len(points)
        if self._dtype == torch.float64:
            self._mixture = mixture.double()
        self._rows = len(batch["input_ids"]) * len(points)
        for vector in self._vectors:
            vector.stand_at(points)
        head = self._head_logits if self._head is not None else None
        found = predictions(self._model, batch, len(points), head)
        if len(self._called) < len(self._forwards):
            raise NotPaired("a module's weights are used without calling it")
        return found

    # What stands in for modules

    def _substitute(self, placed: Sequence[Placed]) -> None:
        held: dict[nn.Module, dict[str, Placed]] = {}
        for tensor in placed:
            for module, attribute in tensor.holders:
                held.setdefault(module, {})[attribute] = tensor
        matrices: dict[int, _Matrix] = {}
        vectors: dict[int, _Vector] = {}

        def matrix_of(tensor: Placed) -> _Matrix:
            return matrices.setdefault(tensor.spec.tensor_id, _Matrix(tensor, self._scope))

        def vector_of(tensor: Placed) -> _Vector:
            return vectors.setdefault(tensor.spec.tensor_id, _Vector(tensor, self._scope))

        for module, tensors in held.items():
            own: Any = module
            vector = {name: vector_of(t) for name, t in tensors.items() if len(t.spec.shape) < 2}
            matrix = {name: matrix_of(t) for name, t in tensors.items() if len(t.spec.shape) == 2}
            linear = type(module) in (nn.Linear, fk.QuantizedLinear)
            if linear and tensors.keys() <= {"weight", "bias"}:
                stand_in = self._linear(own, matrix.get("weight"), vector.get("bias"))
            elif is_conv1d(module) and all(m.holds_walk for m in matrix.values()):
                stand_in = self._conv1d(own, matrix.get("weight"), vector.get("bias"))
            elif _is_embedding(module) and not vector:
                stand_in = self._embedding(own, matrix["weight"])
            elif "Norm" in type(module).__name__ and not matrix and len(vector) == len(tensors):
                stand_in = self._norm(own, vector)
            else:
                raise NotPaired(f"{type(module).__name__} holds {', '.join(tensors)}")
            if module is self._head:
                self._head_matrix = matrix.get("weight")
            self._forwards[module] = self._noted(module, stand_in)
        self._matrices, self._vectors = list(matrices.values()), list(vectors.values())

    def _noted(self, module: nn.Module, stand_in: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            self._called.add(module)
            return stand_in(x)

        forward.stands_in = True  # type: ignore[attr-defined]
        return forward

    def _weighted(self, thin: Tensor, matrix: _Matrix) -> Tensor:
        """thin [rows, terms]: every copy's rows times its amounts."""
        mixture = self._mixture[:, matrix.standing]
        by_copy = thin.view(self._copies, -1, thin.shape[1]) * mixture[:, None, :]
        return by_copy.view(thin.shape).to(thin.dtype)

    def _thin(self, rows: Tensor, matrix: _Matrix, table: Tensor) -> Tensor | None:
        """What every term reads from the rows, times its amount: [rows, terms]; None: no terms."""
        if not matrix.stands:
            return None
        return self._weighted(rows @ _signs(matrix, table, rows.dtype).T, matrix)

    def _linear(self, module: Any, matrix: _Matrix | None, bias: _Vector | None) -> Forward:
        quantised = isinstance(module, fk.QuantizedLinear)

        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            thin = None if matrix is None else self._thin(rows, matrix, matrix.right)
            if quantised:
                y = fk.linear(rows, module.quantized, None if bias else module.bias)
                if thin is not None and matrix is not None:
                    y.addmm_(thin, _signs(matrix, matrix.left, y.dtype))
            elif thin is None or matrix is None:
                y = functional.linear(rows, module.weight, None if bias else module.bias)
            else:
                signs = _signs(matrix, matrix.left, rows.dtype)
                y = (thin @ signs).addmm_(rows, module.weight.T)
                if bias is None and module.bias is not None:
                    y.add_(module.bias)
            y = self._spread(y, bias)
            if matrix is not None and matrix.adapter is not None:
                matrix.adapter.add_(rows.contiguous(), y)
            return y.view(*x.shape[:-1], -1)

        return forward

    def _spread(self, y: Tensor, vector: _Vector | None) -> Tensor:
        """Add every copy's own bias to its rows."""
        if vector is None:
            return y
        return y.view(self._copies, -1, y.shape[1]).add_(vector.values[:, None, :]).view(y.shape)

    def _conv1d(self, module: Any, matrix: _Matrix | None, bias: _Vector | None) -> Forward:
        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            y = rows @ module.weight
            thin = None if matrix is None else self._thin(rows, matrix, matrix.left)
            if thin is not None and matrix is not None:
                y.addmm_(thin, _signs(matrix, matrix.right, y.dtype))
            y = y.add_(module.bias) if bias is None else self._spread(y, bias)
            return y.view(*x.shape[:-1], -1)

        return forward

    def _embedding(self, module: Any, matrix: _Matrix) -> Forward:
        own: Forward = module.forward

        def forward(ids: Tensor) -> Tensor:
            if len(ids) == 1 != self._rows:  # positions, the same for all rows
                ids = ids.expand(self._rows, *ids.shape[1:])
            y = own(ids)
            flat = ids.reshape(-1)
            rows = y.view(len(flat), -1)
            if matrix.stands:
                of_words = _signs(matrix, matrix.left, torch.int8)[:, flat].to(rows.dtype)
                thin = self._weighted(of_words.T.contiguous(), matrix)
                rows.addmm_(thin, _signs(matrix, matrix.right, rows.dtype))
            if matrix.adapter is not None:
                rows.add_(sign_rows(matrix.adapter, flat).to(rows.dtype))
            return y

        return forward

    def _norm(self, module: Any, vectors: dict[str, _Vector]) -> Forward:
        own: Forward = module.forward  # the fused one, where the model is accelerated

        def forward(x: Tensor) -> Tensor:
            before = {name: module._parameters[name] for name in vectors}
            parts = []
            try:
                for copy, part in enumerate(x.chunk(self._copies)):
                    for name, vector in vectors.items():
                        module._parameters[name] = vector.values[copy]
                    parts.append(own(part))
            finally:
                module._parameters.update(before)
            return torch.cat(parts)

        return forward

    def _head_logits(self, rows: Tensor) -> Logits:
        head: Any = self._head
        matrix = self._head_matrix
        self._called.add(head)
        beside = beside_of(head)
        weight = head.quantized if isinstance(head, fk.QuantizedLinear) else head.weight
        thin = None if matrix is None else self._thin(rows, matrix, matrix.right)
        memory = rows.new_empty(len(rows) * min(BLOCK, head.out_features))

        def logits(first: int, past: int) -> Tensor:
            out = memory[: len(rows) * (past - first)].view(len(rows), past - first)
            words = rows_of(weight, first, past, rows.dtype)
            if thin is None or matrix is None:
                torch.mm(rows, words.T, out=out)
            else:
                torch.mm(thin, _signs(matrix, matrix.left[:, first:past], rows.dtype), out=out)
                out.addmm_(rows, words.T)
            if matrix is not None and matrix.adapter is not None:
                matrix.adapter_rows(first, past).add_(rows, out)
            if beside is not None:
                beside.add_(rows, out, first, past)
            return out

        return logits


class _Matrix:
    """The terms beside one matrix [m, n]: term k is the outer product of left[k] and right[k].

    left: int8 [capacity, m], right: int8 [capacity, n], both of signs.
    """

    def __init__(self, placed: Placed, scope: Scope) -> None:
        self._placed, self._scope = placed, scope
        # Of the terms that stand in a pass, those that reach this matrix.
        self.standing: slice | Tensor = slice(0)
        self.stands = False
        self._rows = fk.Part(placed.spec.shape, rows=[0])
        self._columns = fk.Part(placed.spec.shape, columns=[0])
        self.left = torch.empty(PENDING, placed.rows, dtype=torch.int8)
        self.right = torch.empty(PENDING, placed.columns, dtype=torch.int8)
        self.holds_walk = holds_walk(placed.weight)
        self.adapter: fk.SignAdapter | None = None
        self._blocks: dict[int, fk.SignAdapter] = {}

    def write(self, place: int, seed: int) -> None:
        """Make the probe of ``seed`` term ``place``, where it reaches this matrix."""
        if not self._scope.reaches(self._placed.spec, seed):
            return
        if place >= len(self.left):
            grown = 2 * place
            self.left, self.right = (_grown(t, grown) for t in (self.left, self.right))
        spec = self._placed.spec
        column = fk.noise(seed, spec.tensor_id, (spec.shape[0], 1), PROBE, self._columns)[:, 0]
        row = fk.noise(seed, spec.tensor_id, (1, spec.shape[1]), PROBE, self._rows)[0]
        # column = u v[0] and row = u[0] v, all of them signs; their product has u[0] v[0] too much.
        self.left[place].copy_(column)
        torch.mul(row, column[0], out=row)
        self.right[place].copy_(row)

    def stand_among(self, seeds: Sequence[int]) -> None:
        """Take part in a pass in which the terms of ``seeds`` stand."""
        spec = self._placed.spec
        places = [place for place, seed in enumerate(seeds) if self._scope.reaches(spec, seed)]
        self.stands = bool(places)
        whole = len(places) == len(seeds)
        self.standing = slice(len(seeds)) if whole else torch.tensor(places, dtype=torch.int64)

    def fold(self, terms: Terms) -> None:
        """Move the weight itself, where it holds a walk."""
        if self.holds_walk:
            assert isinstance(self._placed.weight, Tensor)
            self._scope.move_(self._placed.weight.data, terms, self._placed.spec, PROBE)

    def stand_beside(self, terms: Terms) -> None:
        """Make all terms of the walk the adapter beside a weight that holds none."""
        spec = self._placed.spec
        terms = self._scope.of(spec, terms)
        if not self.holds_walk and terms:
            amounts = torch.tensor(list(terms.values()), dtype=torch.float32)
            self.adapter = fk.SignAdapter.from_seeds(
                list(terms), amounts, spec.tensor_id, spec.shape
            )
            self._blocks = {}

    def adapter_rows(self, first: int, past: int) -> fk.SignAdapter:
        """The adapter of rows [first, past) of the weight; ``first`` is a multiple of ``BLOCK``."""
        if first not in self._blocks:
            assert self.adapter is not None
            self._blocks[first] = cut(self.adapter, first, past)
        return self._blocks[first]


class _Vector:
    """A parameter of fewer than two dimensions; ``values`` [copies, size] are what the copies see."""

    def __init__(self, placed: Placed, scope: Scope) -> None:
        assert isinstance(placed.weight, Tensor)
        self._weight = placed.weight.data
        self._spec, self._scope = placed.spec, scope
        self._change = (
            None
            if holds_walk(placed.weight)
            else torch.zeros_like(self._weight, dtype=torch.float32)
        )
        self.values = self._weight[None]

    def stand_at(self, points: Sequence[Point]) -> None:
        """Make ``values`` those of some points."""
        start = self._weight if self._change is None else self._weight.float() + self._change
        values = [
            perturbed(start, seed, scale, self._spec.tensor_id, PROBE)
            if scale != 0.0 and self._scope.reaches(self._spec, seed)
            else start
            for seed, scale in points
        ]
        self.values = torch.stack(values).to(self._weight.dtype)

    def move(self, terms: Terms) -> None:
        """Take steps of the walk, at once: a vector is small."""
        target = self._weight if self._change is None else self._change
        self._scope.move_(target, terms, self._spec, PROBE)


def _signs(matrix: _Matrix, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The terms that stand, in one of a matrix's tables: [terms, size]."""
    return table[matrix.standing].to(dtype)


def _is_embedding(module: nn.Module) -> bool:
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return type(module) is fk.QuantizedEmbedding


def _grown(table: Tensor, capacity: int) -> Tensor:
    grown = table.new_empty(capacity, table.shape[1])
    grown[: len(table)] = table
    return grown
