"""From a change of the weights to the message that a node can afford, and what is left for the next.

Error feedback (Seide et al., 2014; Karimireddy et al., 2019): what a message does not carry is kept on
the node and added to its next change, so that nothing is lost, only late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from aggregators import Basis, Layout, ProjectedGradient, Sketch, decode, encode
from aggregators.low_rank import Factors
from aggregators.methods import ProjectedMethod, SketchMethod

Residual = dict[str, Tensor]
Message = TypeVar("Message", ProjectedGradient, Sketch)


def project(
    layout: Layout,
    method: ProjectedMethod,
    change: Mapping[str, Tensor],
    residual: Mapping[str, Tensor] | None = None,
    dtype: str | None = None,
) -> tuple[ProjectedGradient, Residual]:
    """The projection of change + residual on the method's probes, and the new residual.

    ``change`` and ``residual``: name -> float32 of the layout's shape. ``dtype`` is the type in which
    the message will travel: the residual is of what arrives. Tensors of which the method asks for no
    coordinates stay in the residual. Without error feedback the old residual is not added, and the
    new one is empty.
    """
    total = _total(method.error_feedback, change, residual)
    sent = {name: tensor for name, tensor in total.items() if name in method.coordinates}
    update = ProjectedGradient.of(
        layout, method.master_seed, sent, method.coordinates, method.probe
    )
    if not method.error_feedback:
        return update, {}
    arrived = _arrived(update, layout, dtype)
    seen = arrived.shrunk() if method.scale == "mmse" else arrived
    return update, _left(total, sent, seen.dense_tensor)


def sketch(
    layout: Layout,
    method: SketchMethod,
    basis: Basis,
    change: Mapping[str, Tensor],
    residual: Mapping[str, Tensor] | None = None,
    dtype: str | None = None,
) -> tuple[Sketch, Residual]:
    """The sketch of change + residual in ``basis``, and the new residual; arguments as above.

    The residual is against what this node's sketch alone is read as. In a basis that has been refined,
    reading is linear, and the residuals of a cohort sum to what the server's reading leaves out; in a
    random one they only come near it.
    """
    total = _total(method.error_feedback, change, residual)
    known = basis.names
    sent = {name: tensor for name, tensor in total.items() if name in known}
    update = Sketch.of(layout, basis, sent)
    if not method.error_feedback:
        return update, {}
    arrived = _arrived(update, layout, dtype)
    factors = arrived.reconstruct(basis, method.within).factors

    def seen(name: str) -> Tensor | Factors:
        if name in arrived.whole:
            return arrived.whole[name]
        return factors[name] if name in factors else torch.zeros(())

    return update, _left(total, sent, seen)


def _total(
    feedback: bool, change: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    total = {name: tensor.float() for name, tensor in change.items()}
    for name, left in (residual or {}).items() if feedback else ():
        total[name] = total[name] + left if name in total else left
    return total


def _arrived(update: Message, layout: Layout, dtype: str | None) -> Message:
    """The update as the server will read it."""
    if dtype is None:
        return update
    found = decode(encode(update, dtype), layout)
    assert isinstance(found, type(update))
    return found


def _left(
    total: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
    seen: Callable[[str], Tensor | Factors],
) -> Residual:
    """total - seen, tensor by tensor, in float32; the arguments are left as they are."""
    left: Residual = {}
    for name, tensor in total.items():
        if name not in sent:
            left[name] = tensor.clone()
            continue
        arrived = seen(name)
        if isinstance(arrived, Factors):
            left[name] = torch.addmm(
                tensor, arrived.B.float() * arrived.scale.float(), arrived.A.float(), alpha=-1
            )
        else:
            left[name] = (tensor.double() - arrived).float()
    return left
