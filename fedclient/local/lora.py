"""Local LoRA training with peft: the global view and the node's own factors as two adapters.

The base model's tensors are never written. peft wraps the adapted linears for the duration of a
``with`` block and is taken off again, so one model in memory serves any number of nodes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fedkernels as fk
from aggregators import Layout, LowRank, match_targets
from aggregators.messages import Plan
from aggregators.shared_factors import shared_a
from aggregators.view import View
from fedclient.base_model import LoadedModel
from fedclient.beside import standing, standing_on
from fedclient.local.result import TrainingResult
from fedclient.loss import answer_loss
from fedclient.state import weights_of

VIEW, LOCAL = "view", "local"
WEIGHT = ".weight"

Factors = tuple[Tensor, Tensor, Any]
Batch = dict[str, Tensor]


class AdapterError(Exception):
    """Why this plan's adapter cannot be put on this model."""


@dataclass(frozen=True)
class LoraTrainer:
    """``model``: the base with view and local adapter.

    ``weights``: digest of the base where it was rebuilt, or is quantised.
    """

    model: PeftModel
    layout: Layout
    plan: Plan
    weights: str | None

    def train(
        self, batches: Iterable[Batch], progress: Callable[[int, int, float], None] | None = None
    ) -> tuple[LowRank, TrainingResult]:
        """Train the local adapter; return what the node sends of it."""
        before = read_factors(self.model, self.layout, self.plan)
        result = train(self.model, batches, self.plan, progress)
        after = read_factors(self.model, self.layout, self.plan)
        return local_update(before, after, self.layout, self.plan), result


@contextmanager
def trainer(plan: Plan, base: LoadedModel, layout: Layout, view: View) -> Iterator[LoraTrainer]:
    """A local adapter on the base, beside the view's adapter or on weights that are the view.

    Change along probes is not low-rank: it is in the weights, or where they are quantised, beside them.
    """
    method = plan.lora
    if method.start == "view" and plan.action == "evaluate":
        # What is evaluated is the view as it is, of whatever rank.
        fresh = method.model_copy(update={"start": "fresh"})
        plan = plan.model_copy(update={"method": fresh})
    model, factors, weights = base.model, view.factors(), None
    # Other families may have changed matrices that this node's adapter does not stand beside.
    adapted_names = match_targets(layout, method.target_modules, method.layers)
    beyond = view.full_rank or not (factors or {}).keys() <= set(adapted_names)
    with ExitStack() as stack:
        if base.format != "full":
            made = standing(base, view)
            weights = made.digest
            if beyond:
                factors = None
                stack.enter_context(standing_on(model, layout, made))
        elif beyond:
            rebuilt = weights_of(base, layout, view)
            model, factors, weights = rebuilt.model, None, rebuilt.digest
        wrapped = stack.enter_context(adapted(model, layout, plan, factors))
        yield LoraTrainer(wrapped, layout, plan, weights)


@contextmanager
def adapted(
    model: nn.Module, layout: Layout, plan: Plan, view: Mapping[str, Factors] | None
) -> Iterator[PeftModel]:
    """Wrap ``model`` with the frozen view and a trainable adapter of the plan's rank.

    With ``plan.accelerate`` its known modules run fused (`fk.accelerate`) until the block ends.

    ``view``: layout name -> (B [out, k], A [k, in], scale). With ``plan.lora.start == "view"`` the view
    is the trainable adapter's start and nothing is frozen beside it. Raises AdapterError.
    """
    targets = match_targets(layout, plan.lora.target_modules, plan.lora.layers)
    modules = {name.removesuffix(WEIGHT): name for name in targets}
    frozen = view if view and plan.lora.start == "fresh" else None
    transposed = {path: _is_transposed(model.get_submodule(path)) for path in modules}
    _check_targets(model, layout, plan, modules)
    training = model.training
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads a property that transformers 5 renamed.
            warnings.simplefilter("ignore", FutureWarning)
            # It finds out by itself what a Conv1D is, and says so for every one of them.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            wrapped = get_peft_model(
                cast(Any, model), _configuration(plan, modules, layout), adapter_name=LOCAL
            )
            if frozen is not None:
                wrapped.add_adapter(VIEW, _view_configuration(frozen))
        if frozen is not None:
            _write(wrapped, VIEW, frozen, transposed)
        _initialise(wrapped, plan, layout, modules, transposed, view)
        active = [LOCAL] if frozen is None else [VIEW, LOCAL]
        cast(Any, wrapped.base_model).set_adapter(active)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(f".{LOCAL}." in name)
        if not plan.lora.train_a:
            for path, layer in _lora_layers(wrapped):
                # In the layout's coordinates a Conv1D's A is peft's B.
                fixed = layer.lora_B if transposed[path] else layer.lora_A
                fixed[LOCAL].weight.requires_grad_(False)
        if plan.accelerate:
            fk.accelerate(wrapped)
        yield wrapped
    finally:
        fk.restore(model)
        _unwrap(model)
        model.train(training)


def train(
    wrapped: PeftModel,
    batches: Iterable[Batch],
    plan: Plan,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainingResult:
    """AdamW over the local factors; one optimiser step a batch."""
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters,
        lr=plan.learning_rate,
        weight_decay=plan.lora.weight_decay,
        fused=plan.accelerate,
    )
    losses: list[float] = []
    tokens = 0
    wrapped.train(plan.lora.dropout > 0)
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, (step + 1) / max(1, plan.lora.warmup_steps))
        loss_sum, labelled, _ = answer_loss(wrapped, batch)
        loss = loss_sum / max(1, labelled)
        optimiser.zero_grad(set_to_none=True)
        cast(Any, loss).backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        tokens += labelled
        if progress is not None:
            progress(step + 1, plan.local_steps, losses[-1])
    wrapped.eval()
    return TrainingResult(losses[0], losses[-1], tokens, len(losses))


def read_factors(wrapped: PeftModel, layout: Layout, plan: Plan) -> dict[str, Factors]:
    """The local adapter in layout coordinates: name -> (B, A, alpha / r), copies."""
    found: dict[str, Factors] = {}
    for path, layer in _lora_layers(wrapped):
        a = layer.lora_A[LOCAL].weight.detach()
        b = layer.lora_B[LOCAL].weight.detach()
        if layer.fan_in_fan_out:
            b, a = a.T, b.T
        found[path + WEIGHT] = (
            b.clone(memory_format=torch.contiguous_format),
            a.clone(memory_format=torch.contiguous_format),
            float(layer.scaling[LOCAL]),
        )
    return {
        name: found[name]
        for name in match_targets(layout, plan.lora.target_modules, plan.lora.layers)
    }


def local_update(
    before: Mapping[str, Factors], after: Mapping[str, Factors], layout: Layout, plan: Plan
) -> LowRank:
    """What the node sends: its factors, or their change as a stack [after, before negated]."""
    update = LowRank(layout, dict(after))
    if plan.lora.sends == "delta":
        update = update - LowRank(layout, dict(before))
    return update


def _check_targets(
    model: nn.Module, layout: Layout, plan: Plan, modules: Mapping[str, str]
) -> None:
    if not modules:
        raise AdapterError(
            f"target_modules {list(plan.lora.target_modules)} match no linear layer of this model"
        )
    for path, name in modules.items():
        module = model.get_submodule(path)
        if not (isinstance(module, nn.Linear) or _is_transposed(module)):
            raise AdapterError(
                f"layer {name!r} is of the type {type(module).__name__}; LoRA adapts linear layers"
                " here: take it out of target_modules"
            )
        rank = min(plan.lora.rank, *layout.shape(name))
        if plan.lora.init == "orthogonal" and rank % 2:
            raise AdapterError(
                f"layer {name!r}: orthogonal initialisation needs an even rank, not {rank}"
            )


def _configuration(plan: Plan, modules: Mapping[str, str], layout: Layout) -> LoraConfig:
    ranks = {
        _pattern(path): min(plan.lora.rank, *layout.shape(name)) for path, name in modules.items()
    }
    inits: dict[str, Any] = {"gaussian": "gaussian", "orthogonal": "orthogonal"}
    return LoraConfig(
        r=plan.lora.rank,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != plan.lora.rank},
        # alpha / r stays what the plan says where a matrix is too small for the rank.
        alpha_pattern={
            path: _alpha(plan, rank) for path, rank in ranks.items() if rank != plan.lora.rank
        },
        lora_alpha=cast(Any, plan.lora.alpha),
        lora_dropout=plan.lora.dropout,
        use_rslora=plan.lora.rslora,
        target_modules=list(modules),
        init_lora_weights=inits.get(plan.lora.init, True),
    )


def _alpha(plan: Plan, rank: int) -> Any:
    ratio = math.sqrt(rank / plan.lora.rank) if plan.lora.rslora else rank / plan.lora.rank
    return plan.lora.alpha * ratio


def _view_configuration(view: Mapping[str, Factors]) -> LoraConfig:
    ranks = {name.removesuffix(WEIGHT): factors[0].shape[1] for name, factors in view.items()}
    largest = max(ranks.values())
    patterns = {_pattern(path): rank for path, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=list(ranks),
    )


def _initialise(
    wrapped: PeftModel,
    plan: Plan,
    layout: Layout,
    modules: Mapping[str, str],
    transposed: Mapping[str, bool],
    view: Mapping[str, Factors] | None,
) -> None:
    """Set the local adapter's start. B is zero unless the view itself is trained further."""
    start: dict[str, Factors] = {}
    for path, name in modules.items():
        rows, columns = layout.shape(name)
        rank = min(plan.lora.rank, rows, columns)
        zeros = torch.zeros(rows, rank)
        seen = view.get(name) if view else None
        if seen is not None and (plan.lora.start == "view" or plan.lora.init == "carry"):
            b, a = _fold_scale(seen, _scale(wrapped, path))
            start[name] = _resize(
                b if plan.lora.start == "view" else torch.zeros_like(b), a, rank, plan, layout, name
            )
        elif plan.lora.init in ("shared", "previous") or (plan.lora.start == "view" and not seen):
            start[name] = (zeros, _shared(plan, layout, name, rank), None)
        elif plan.lora.init in ("random", "carry"):
            tensor_id = layout.tensor_id(name)
            noise = fk.noise(plan.seed, tensor_id, (rank, columns)) / math.sqrt(3 * columns)
            start[name] = (zeros, noise, None)
    _write(wrapped, LOCAL, start, transposed)


def _resize(b: Tensor, a: Tensor, rank: int, plan: Plan, layout: Layout, name: str) -> Factors:
    """The first ``rank`` components; missing ones get B = 0 and a fresh shared A."""
    missing = rank - b.shape[1]
    if missing > 0:
        fresh = _shared(plan, layout, name, rank)[b.shape[1] :]
        b = torch.cat([b, torch.zeros(b.shape[0], missing)], dim=1)
        a = torch.cat([a, fresh], dim=0)
    return b[:, :rank], a[:rank], None


def _shared(plan: Plan, layout: Layout, name: str, rank: int) -> Tensor:
    return shared_a(plan.lora.shared_seed, layout.tensor_id(name), rank, layout.shape(name)[1])


def _fold_scale(factors: Factors, scaling: float) -> tuple[Tensor, Tensor]:
    """B and A whose peft product, times ``scaling``, is the view's change."""
    b, a, scale = factors
    weights = torch.as_tensor(scale, dtype=torch.float64) / scaling
    return (b.double() * weights).float(), a.float()


def _scale(wrapped: PeftModel, path: str) -> float:
    return float(dict(_lora_layers(wrapped))[path].scaling[LOCAL])


def _write(
    wrapped: PeftModel, adapter: str, factors: Mapping[str, Factors], transposed: Mapping[str, bool]
) -> None:
    layers = dict(_lora_layers(wrapped))
    with torch.no_grad():
        for name, (b, a, scale) in factors.items():
            path = name.removesuffix(WEIGHT)
            if scale is not None:
                b, a = _fold_scale((b, a, scale), float(layers[path].scaling[adapter]))
            if transposed[path]:
                b, a = a.T, b.T
            layers[path].lora_A[adapter].weight.copy_(a)
            layers[path].lora_B[adapter].weight.copy_(b)


def _lora_layers(wrapped: PeftModel) -> Iterator[tuple[str, Any]]:
    for path, module in cast(nn.Module, wrapped.base_model.model).named_modules():
        if hasattr(module, "lora_A"):
            yield path, module


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def _pattern(path: str) -> str:
    return re.escape(path)


def _unwrap(model: nn.Module) -> None:
    """Put the plain linears back, also after an error in the middle of wrapping."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(leftover, None)
