"""The fused parts of a training step equal their references, in value and in gradient, everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedkernels as fk
from fedkernels.reference import training as reference

# The fixture only selects a backend: it carries nothing from one example to the next.
every_backend = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.5e-2}
SEEDS = st.integers(0, 2**31)


def random_tensors(seed: int, dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator).to(dtype) for shape in shapes]


def assert_equal_with_gradients(
    fast: Callable[..., Sequence[Tensor]],
    slow: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
) -> None:
    """Both functions' results and gradients, for one random weighting of the results.

    Errors are measured against a tensor's norm and the weighting's: gradients can cancel.
    """
    found = []
    for function in (fast, slow):
        leaves = [t.clone().requires_grad_() for t in inputs]
        results = function(*leaves)
        weights = [random_tensors(7, r.dtype, r.shape)[0] for r in results]
        gradients = torch.autograd.grad(results, leaves, weights)
        scale = sum(float(weight.double().norm()) for weight in weights)
        found.append([*(r.detach() for r in results), *gradients])
    tolerance = TOLERANCES[inputs[0].dtype]
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        distance = (mine.double() - theirs.double()).norm()
        assert distance <= tolerance * (theirs.double().norm() + scale)


@every_backend
@given(seed=SEEDS, dtype=DTYPES, rows=st.integers(1, 9), width=st.integers(4, 70))
def test_rms_norm(backend, seed, dtype, rows, width):
    x, weight = random_tensors(seed, dtype, (2, rows, width), (width,))
    assert_equal_with_gradients(
        lambda x: [fk.rms_norm(x, weight, 1e-5)],
        lambda x: [reference.rms_norm(x, weight, 1e-5)],
        [x],
    )


@every_backend
@given(seed=SEEDS, dtype=DTYPES, count=st.integers(1, 200), size=st.sampled_from([0.1, 1, 30]))
def test_swiglu(backend, seed, dtype, count, size):
    gate, up = random_tensors(seed, dtype, (count,), (count,))
    assert_equal_with_gradients(
        lambda gate, up: [fk.swiglu(gate, up)],
        lambda gate, up: [reference.swiglu(gate, up)],
        [gate * size, up],
    )


@every_backend
@given(
    seed=SEEDS,
    dtype=DTYPES,
    batch=st.integers(1, 2),
    length=st.integers(1, 60),
    groups=st.integers(1, 2),
    sharing=st.integers(1, 3),
    width=st.sampled_from([2, 8, 10, 32, 48]),
    masked=st.booleans(),
    rotated=st.booleans(),
)
def test_attention(backend, seed, dtype, batch, length, groups, sharing, width, masked, rotated):
    q, k, v = random_tensors(
        seed,
        dtype,
        (batch, length, groups * sharing, width),
        (batch, length, groups, width),
        (batch, length, groups, width),
    )
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(1, length, width // 2, generator=generator).repeat(1, 1, 2) * 6
    rotary = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotated else None
    # Some queries of a random mask may look at nothing.
    mask = torch.rand(batch, length, length, generator=generator) < 0.3 if masked else None
    scale = width**-0.5
    assert_equal_with_gradients(
        lambda q, k, v: [fk.attention(q, k, v, rotary, mask)],
        lambda q, k, v: [reference.attention(q, k, v, rotary, mask, scale)],
        [q, k, v],
    )


@every_backend
@given(
    seed=SEEDS,
    dtype=DTYPES,
    rows=st.integers(1, 100),
    width=st.integers(1, 70),
    shapes=st.lists(
        st.tuples(st.integers(1, 70), st.lists(st.integers(1, 9), max_size=2), st.booleans()),
        min_size=1,
        max_size=3,
    ),
)
def test_adapted_linears(backend, seed, dtype, rows, width, shapes):
    """Siblings with any number of adapters of any ranks, with and without bias."""
    (x,) = random_tensors(seed, dtype, (rows, width))
    factors, frozen = [], []
    for out, ranks, biased in shapes:
        weight, bias = random_tensors(seed + 1, dtype, (out, width), (out,))
        frozen.append((weight, bias if biased else None, len(ranks)))
        for rank in ranks:
            factors += random_tensors(seed + rank, torch.float32, (rank, width), (out, rank))

    def siblings(leaves: Sequence[Tensor]) -> list[fk.AdaptedLinear]:
        rest = list(leaves)
        linears = []
        for weight, bias, number in frozen:
            mine = [fk.Factor(rest.pop(0), rest.pop(0), 0.5) for _ in range(number)]
            linears.append(fk.AdaptedLinear(weight, bias, tuple(mine)))
        return linears

    def slow(x: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [
            reference.adapted_linear(x, linear.weight, linear.bias, linear.factors)
            for linear in siblings(leaves)
        ]

    assert_equal_with_gradients(
        lambda x, *leaves: fk.adapted_linears(x, siblings(leaves)), slow, [x, *factors]
    )


def test_only_what_needs_a_gradient_gets_one(backend):
    """Frozen A beside a trained B, a frozen adapter beside a trained one, an input without gradient."""
    x, weight = random_tensors(0, torch.float32, (6, 5), (4, 5))
    a1, b1, a2, b2 = random_tensors(1, torch.float32, (2, 5), (4, 2), (3, 5), (4, 3))
    linear = fk.AdaptedLinear(weight, None, (fk.Factor(a1, b1, 1.0), fk.Factor(a2, b2, 2.0)))
    tensors = (x, a1, b1, a2, b2)
    for trained in ([b2], [a1, b2], [x], [b1], [a2], [x, a1, a2]):
        for tensor in tensors:
            tensor.requires_grad_(any(tensor is one for one in trained))
        mine = torch.autograd.grad(fk.adapted_linears(x, [linear])[0].square().sum(), trained)
        plain = reference.adapted_linear(x, weight, None, linear.factors)
        theirs = torch.autograd.grad(plain.square().sum(), trained)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@every_backend
@given(
    seed=SEEDS,
    dtype=DTYPES,
    rows=st.integers(1, 20),
    vocabulary=st.integers(1, 90),
    chunk=st.integers(1, 25),
    size=st.sampled_from([0.1, 1, 20]),
)
def test_cross_entropy(backend, seed, dtype, rows, vocabulary, chunk, size):
    hidden, weight = random_tensors(seed, dtype, (rows, 12), (vocabulary, 12))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    assert_equal_with_gradients(
        lambda hidden: [fk.cross_entropy(hidden, weight, labels, chunk).total],
        lambda hidden: [reference.cross_entropy(hidden, weight, labels)[0]],
        [hidden * size],
    )
    _, labelled, correct = reference.cross_entropy(hidden, weight, labels)
    loss = fk.cross_entropy(hidden, weight, labels, chunk)
    assert (loss.labelled, loss.correct) == (labelled, correct)


@every_backend
@given(
    seed=SEEDS,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
)
def test_losses_of_logits_row_by_row(backend, seed, dtype, rows, vocabulary):
    (logits,) = random_tensors(seed, torch.float32, (rows, vocabulary))
    logits = (5 * logits).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    losses, best = fk.logit_losses(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(logits.gather(1, best[:, None])[:, 0], logits.max(1).values)


def test_no_labels_give_zero_loss_and_zero_gradients(backend):
    hidden, weight = random_tensors(0, torch.bfloat16, (2, 3, 8), (20, 8))
    hidden.requires_grad_()
    loss = fk.cross_entropy(hidden, weight, torch.full((2, 3), -100))
    loss.total.backward()
    assert (float(loss.total.detach()), loss.labelled, loss.correct) == (0.0, 0, 0)
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_extreme_logits_stay_finite(backend):
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    loss = fk.cross_entropy(hidden, weight, torch.tensor([0, 0]))
    loss.total.backward()
    assert float(loss.total.detach()) == 2e4
    assert torch.equal(hidden.grad, torch.tensor([[0.0], [-2.0]]))


def test_not_a_number_is_not_hidden(backend):
    x = torch.ones(2, 8)
    x[1, 3] = float("nan")
    for result in (fk.rms_norm(x, torch.ones(8), 1e-5), fk.swiglu(x, torch.ones_like(x))):
        assert result[0].isfinite().all()
        assert result[1].isnan().any()
    assert fk.attention(*(x.view(1, 2, 1, 8),) * 3)[0, 1].isnan().any()
    assert fk.cross_entropy(x, torch.ones(3, 8), torch.tensor([0, 0])).total.isnan()


X, W = torch.ones(2, 3, 4), torch.ones(5, 4)
Q = torch.ones(1, 3, 4, 6)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fk.rms_norm(X, torch.ones(3), 1e-5), "weight"),
        (lambda: fk.rms_norm(X.long(), torch.ones(4), 1e-5), "x must"),
        (lambda: fk.rms_norm(torch.ones(0, 4), torch.ones(4), 1e-5), "x is empty"),
        (lambda: fk.swiglu(X, X[0]), "up"),
        (lambda: fk.swiglu(X, X.double()), "up"),
        (lambda: fk.attention(Q[0], Q, Q), "q"),
        (lambda: fk.attention(Q, Q[:, :, :3], Q[:, :, :3]), "k has 3"),
        (lambda: fk.attention(Q, Q, Q[:, :2]), "v"),
        (lambda: fk.attention(Q, Q, Q, mask=torch.ones(1, 3, 3)), "mask"),
        (lambda: fk.attention(Q, Q, Q, mask=torch.ones(2, 3, 3, dtype=torch.bool)), "mask"),
        (lambda: fk.attention(Q, Q, Q, (torch.ones(1, 3, 5), torch.ones(1, 3, 6))), "cosine"),
        (lambda: fk.attention(*(Q[..., :5],) * 3, (torch.ones(1, 3, 5),) * 2), "odd width"),
        (lambda: fk.adapted_linears(X, []), "linears"),
        (lambda: fk.adapted_linears(X, [fk.AdaptedLinear(W.T)]), "weight"),
        (lambda: fk.adapted_linears(X, [fk.AdaptedLinear(W, torch.ones(4))]), "bias"),
        (lambda: fk.adapted_linears(X, [_adapted(torch.ones(2, 5), torch.ones(5, 2))]), "A"),
        (lambda: fk.adapted_linears(X, [_adapted(torch.ones(2, 4), torch.ones(5, 3))]), "B"),
        (lambda: fk.cross_entropy(X, W, torch.zeros(2, 3)), "labels must be int64"),
        (lambda: fk.cross_entropy(X, W, torch.zeros(2, 2).long()), "labels"),
        (lambda: fk.logit_losses(W, torch.zeros(5)), "labels must be int64"),
        (lambda: fk.logit_losses(W, torch.zeros(4).long()), "labels"),
        (lambda: fk.logit_losses(W, torch.tensor([0, 1, 2, 3, 4])), "vocabulary"),
        (lambda: fk.logit_losses(X, torch.zeros(2).long()), "logits"),
        (lambda: fk.cross_entropy(X, W, torch.full((2, 3), 5)), "labels"),
        (lambda: fk.cross_entropy(X, W, torch.full((2, 3), -1)), "labels"),
        (lambda: fk.cross_entropy(X, W[:, :3], torch.zeros(2, 3).long()), "weight"),
        (lambda: fk.cross_entropy(X, W, torch.zeros(2, 3).long(), chunk=0), "chunk"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(backend, call, named):
    with pytest.raises(ValueError, match=named):
        call()


def _adapted(a: Tensor, b: Tensor) -> fk.AdaptedLinear:
    return fk.AdaptedLinear(W, None, (fk.Factor(a, b, 1.0),))


def test_operations_in_place_may_follow(backend):
    tensor = fk.quantize(torch.randn(8, 8), "nf4")
    adapter = fk.SignAdapter.from_seeds([1, 2], torch.ones(2), 0, (8, 8))
    x, row, thin = torch.randn(2, 3, 8), torch.ones(8), torch.ones(1, 8)
    functions = (
        lambda x: fk.linear(x, tensor),
        lambda x: fk.lora_linear(x, tensor, thin, thin.T, 1.0),
        lambda x: fk.adapted_linears(x, [fk.AdaptedLinear(torch.eye(8))])[0],
        lambda x: fk.rms_norm(x, row, 1e-5),
        lambda x: fk.swiglu(x, x),
        adapter,
    )
    for function in functions:
        plain, clamped = (x.clone().requires_grad_() for _ in range(2))
        function(plain).relu().sum().backward()
        function(clamped).relu_().sum().backward()
        assert torch.equal(clamped.grad, plain.grad)
