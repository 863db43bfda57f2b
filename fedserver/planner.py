"""What each node is asked to do in a round: a plan that its capabilities and the scenario allow.

Plans are functions of (scenario, round, node) and the model's sums: a resumed run asks exactly what the
first one asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from aggregators import Layout, match_targets
from aggregators.factor_scalars import lora_scale
from aggregators.messages import Capabilities, DeviceCapabilities, Plan
from aggregators.methods import (
    MOST_COORDINATES,
    FactorMethod,
    HybridMethod,
    LoraMethod,
    Method,
    ProjectedMethod,
    SketchMethod,
    ZerothOrderMethod,
)
from aggregators.presets import PRESETS
from aggregators.probe_sum import ProbeSum
from aggregators.projected import allocation
from aggregators.targets import is_embedding, layer_count, trained_names
from fedserver.configuration import ConfigurationError, RunConfiguration
from fedserver.probe_allocation import measured_norms, size_norms

# What every strand has its own of, and every node may have.
PACE = ("local_steps", "micro_batch_size", "learning_rate")
OF_THE_PLAN = {*PACE, "wire_dtype"}


def data_specification(configuration: RunConfiguration) -> dict[str, Any]:
    """The partition as simulated nodes read it; a deployed node overrides it with its own data."""
    data = configuration.data
    listed = data.partition == "categories"
    return {
        **data.model_dump(mode="json"),
        "categories": [list(node.categories or ()) for node in configuration.nodes]
        if listed
        else None,
        "nodes": len(configuration.nodes),
        "seed": configuration.seed,
    }


def check_targets(configuration: RunConfiguration, layout: Layout) -> list[str]:
    """The tensors that LoRA nodes adapt.

    Refuses targets that match nothing, ranks that no matrix has, and fewer coordinates than tensors.
    """
    targets = match_targets(layout, configuration.lora_target_modules)
    if not targets:
        raise ConfigurationError(
            f"lora_target_modules {list(configuration.lora_target_modules)} match no 2-D weight of"
            f" {configuration.base_model}; try 'all-linear', or module names such as 'q_proj'"
        )
    if any(configuration.strand(node.name) == "lora" for node in configuration.nodes):
        _refuse_embeddings("lora_target_modules", targets)
    limit = max(min(layout.shape(name)) for name in targets)
    for node in configuration.nodes:
        rank = node.lora_r or configuration.lora_r
        if rank > limit:
            raise ConfigurationError(
                f"node {node.name!r}: lora_r {rank} exceeds the largest possible rank {limit}"
                f" of the adapted matrices"
            )
    if any(configuration.strand(node.name) == "zeroth-order" for node in configuration.nodes):
        check_reach(configuration, layout)
    if any(configuration.strand(node.name) == "projected" for node in configuration.nodes):
        if not trained(layout, configuration.projected.target_modules):
            modules = list(configuration.projected.target_modules)
            raise ConfigurationError(
                f"projected.target_modules {modules} match no 2-D weight of"
                f" {configuration.base_model}"
            )
        try:
            _projected(configuration, layout, 1, "", ())
        except ValueError as error:
            raise ConfigurationError(f"projected.coordinates: {error}") from None
    return targets


def check_reach(configuration: RunConfiguration, layout: Layout) -> None:
    """Refuse zeroth-order training of no tensor, and of more blocks than layers."""
    settings = configuration.zeroth_order
    method = zeroth_order(configuration)
    if settings.estimator == "hybrid":
        count = layer_count(layout)
        cut = settings.cut or count // 2
        if not 0 < cut < count:
            raise ConfigurationError(
                f"zeroth_order.cut {cut} leaves no layer on one side: {configuration.base_model} has"
                f" {count} layers"
            )
        if not match_targets(layout, configuration.lora_target_modules, (cut, count)):
            raise ConfigurationError(
                f"lora_target_modules {list(configuration.lora_target_modules)} match no weight of the"
                f" layers from {cut} on"
            )
        method = method.model_copy(update={"layers": (0, cut)})
    names = trained_names(layout, method.target_modules, method.layers)
    if not names:
        raise ConfigurationError(
            f"zeroth_order.target_modules {list(method.target_modules)} and layers"
            f" {list(method.layers or ())} match no weight of {configuration.base_model}, which has"
            f" {layer_count(layout)} layers"
        )
    if isinstance(method, FactorMethod):
        _refuse_embeddings("zeroth_order.target_modules", names)
    try:
        method.reach.block_of(layout, names)
    except ValueError as error:
        raise ConfigurationError(f"zeroth_order: {error}") from None


def _refuse_embeddings(key: str, names: Sequence[str]) -> None:
    """Factors stand beside linear layers: every node would fail in every round."""
    if found := [name for name in names if is_embedding(name)]:
        raise ConfigurationError(
            f"{key}: {found[0]!r} is an embedding, and LoRA adapts linear layers here: take it out"
        )


def make_plan(
    configuration: RunConfiguration,
    capabilities: Capabilities | DeviceCapabilities,
    *,
    round_number: int,
    layout: Layout,
    base_digest: str,
    action: str = "train",
    sums: Sequence[ProbeSum] = (),
) -> Plan:
    """The plan of one node for one round (rounds count from 1; the final evaluation is rounds + 1).

    ``sums``: the state's, from which probes are spread over tensors.
    """
    name = capabilities.node
    node = configuration.node(name)
    if node is not None and not node.trains:
        action = "evaluate"
    settings = _settings(configuration, name)
    run = configuration.run_id()
    return Plan.model_validate(
        {
            "run": run,
            "round": round_number,
            "node": name,
            "nonce": _digest(run, action, round_number, name)[:32],
            "layout": layout.fingerprint,
            "base_model": configuration.base_model,
            "base_digest": base_digest,
            "action": action,
            "preset": configuration.preset,
            "method": make_method(
                configuration, capabilities, round_number=round_number, layout=layout, sums=sums
            ),
            "seed": int(_digest(run, "seed", round_number, name)[:15], 16),
            "local_steps": settings["local_steps"],
            "batch_size": settings["micro_batch_size"],
            "learning_rate": settings["learning_rate"],
            "max_length": configuration.max_length,
            "dtype": configuration.base_dtype,
            "base_format": configuration.base_format_of(name),
            "wire_dtype": settings["wire_dtype"],
            "threads": configuration.threads,
            "accelerate": configuration.accelerate,
            "evaluate": configuration.evaluate,
            "deadline_seconds": configuration.deadline_seconds,
            "max_norm": configuration.max_norm,
            "data": data_specification(configuration),
        }
    )


def make_method(
    configuration: RunConfiguration,
    capabilities: Capabilities | DeviceCapabilities,
    *,
    round_number: int,
    layout: Layout,
    sums: Sequence[ProbeSum] = (),
) -> Method:
    """How one node trains in one round, by its strand."""
    strand = configuration.strand(capabilities.node)
    if strand == "lora":
        return _lora(configuration, capabilities)
    if strand == "zeroth-order":
        if configuration.zeroth_order.estimator == "hybrid":
            return hybrid(configuration, capabilities, layout)
        return zeroth_order(configuration)
    return _projected(configuration, layout, round_number, capabilities.node, sums)


def zeroth_order(configuration: RunConfiguration) -> ZerothOrderMethod:
    """How a node trains by forward passes alone: the same in every round, so that scalars add."""
    settings = configuration.zeroth_order.model_dump(exclude={*OF_THE_PLAN, "trains", "cut"})
    if settings["estimator"] == "hybrid":
        settings["estimator"] = "spsa"
    settings |= {"master_seed": _seed(configuration, "pool"), "sampling": configuration.sampling}
    if configuration.zeroth_order.trains == "weights":
        return ZerothOrderMethod(**settings)
    alpha, rank = configuration.lora_alpha, configuration.lora_r
    settings["target_modules"] = settings["target_modules"] or ("all-linear",)
    return FactorMethod(
        **settings,
        rank=rank,
        scale=lora_scale(alpha, rank, configuration.lora_rslora),
        shared_seed=_seed(configuration, "factors"),
    )


def hybrid(
    configuration: RunConfiguration, capabilities: Capabilities | DeviceCapabilities, layout: Layout
) -> HybridMethod:
    """Zeroth-order steps below the cut, by default half of the layers, and the run's LoRA above it."""
    count = layer_count(layout)
    cut = configuration.zeroth_order.cut or count // 2
    return HybridMethod(
        lower=zeroth_order(configuration).model_copy(update={"layers": (0, cut)}),
        upper=_lora(configuration, capabilities).model_copy(update={"layers": (cut, count)}),
        upper_learning_rate=configuration.learning_rate,
    )


def _settings(configuration: RunConfiguration, name: str) -> dict[str, Any]:
    """Steps, batch, rate and type on the wire: the node's own, else the strand's, else the run's."""
    found = {key: getattr(configuration, key) for key in OF_THE_PLAN}
    strand = configuration.strand(name)
    if strand != "lora":
        table = getattr(configuration, strand.replace("-", "_"))
        found |= {key: getattr(table, key) for key in OF_THE_PLAN if hasattr(table, key)}
    node = configuration.node(name)
    own = {} if node is None else node.model_dump(include=set(PACE), exclude_none=True)
    return found | own


def _lora(
    configuration: RunConfiguration, capabilities: Capabilities | DeviceCapabilities
) -> LoraMethod:
    preset = PRESETS[configuration.preset]
    node = configuration.node(capabilities.node)
    asked = (node.lora_r if node else None) or configuration.lora_r
    rank = min(asked, capabilities.rank_limit)
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA, whose point is that alpha stays. Plain
    # LoRA's alpha grows with the rank, so that all nodes have the scale of lora_alpha / lora_r.
    growth = 1.0 if configuration.lora_rslora else rank / configuration.lora_r
    alpha = (node.lora_alpha if node else None) or configuration.lora_alpha * growth
    return LoraMethod.model_validate(
        {
            "rank": rank,
            "alpha": alpha,
            "rslora": configuration.lora_rslora,
            "dropout": configuration.lora_dropout,
            "target_modules": configuration.lora_target_modules,
            "init": configuration.lora_init or preset.init,
            "train_a": preset.train_a,
            "start": preset.start,
            "sends": preset.sends,
            "shared_seed": configuration.seed,
            "weight_decay": configuration.weight_decay,
            "warmup_steps": configuration.warmup_steps,
        }
    )


def _projected(
    configuration: RunConfiguration,
    layout: Layout,
    round_number: int,
    node: str,
    sums: Sequence[ProbeSum],
) -> ProjectedMethod | SketchMethod:
    settings = configuration.projected
    shared = settings.model_dump(
        include={
            "target_modules", "optimiser", "subset", "subset_share", "gradient_rank",
        }
    )  # fmt: skip
    shared["error_feedback"] = configuration.error_feedback
    if configuration.basis == "adaptive":
        return SketchMethod(
            master_seed=basis_seed(configuration),
            rank=settings.rank,
            oversampling=settings.oversampling,
            within=settings.within,
            **shared,
        )
    names = trained(layout, settings.target_modules)
    norms = _last_norms(configuration, round_number, names, sums) or size_norms(layout, names)
    return ProjectedMethod(
        # Probes that nobody has seen: a pool that stays would confine training to its span.
        master_seed=_projection_seed(configuration, round_number, node),
        probe=settings.probe,
        scale=settings.scale,
        coordinates={
            name: min(count, MOST_COORDINATES)
            for name, count in allocation(norms, settings.coordinates).items()
        },
        **shared,
    )


def _last_norms(
    configuration: RunConfiguration,
    round_number: int,
    names: Sequence[str],
    sums: Sequence[ProbeSum],
) -> dict[str, float] | None:
    """What the last round that had projections showed; None before there is one, or if not asked."""
    if configuration.projected.allocation == "sizes":
        return None
    nodes = [node.name for node in configuration.nodes]
    for number in range(round_number - 1, 0, -1):
        seeds = {_projection_seed(configuration, number, node) for node in nodes}
        found = measured_norms(sums, seeds, names, configuration.projected.scale)
        if found is not None:
            return found
    return None


def _projection_seed(configuration: RunConfiguration, round_number: int, node: str) -> int:
    own = (node,) if configuration.projected.seeds == "per-node" else ()
    return _seed(configuration, "projection", round_number, *own)


def trained(layout: Layout, target_modules: Sequence[str]) -> list[str]:
    """The tensors that full-weight training may change; () means all."""
    return match_targets(layout, target_modules) if target_modules else [s.name for s in layout]


def basis_seed(configuration: RunConfiguration) -> int:
    """The seed of a run's first basis, and of what later ones have at random."""
    return _seed(configuration, "basis")


def _seed(configuration: RunConfiguration, *parts: Any) -> int:
    return int(_digest(configuration.run_id(), "seed", *parts)[:15], 16)


def _digest(*parts: Any) -> str:
    return hashlib.sha256("|".join(str(part) for part in parts).encode()).hexdigest()
