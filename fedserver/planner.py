"""What each node is asked to do in a round: a plan that its capabilities and the scenario allow.

Plans are functions of (scenario, round, node): a resumed run asks exactly what the first one asked.
"""

from __future__ import annotations

import hashlib
from typing import Any

from aggregators import Layout, match_targets
from aggregators.messages import Capabilities, Plan
from aggregators.presets import PRESETS
from fedserver.configuration import ConfigurationError, RunConfiguration


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


def check_ranks(configuration: RunConfiguration, layout: Layout) -> list[str]:
    """The tensors that the run adapts. Refuses targets that match nothing and impossible ranks."""
    targets = match_targets(layout, configuration.lora_target_modules)
    if not targets:
        raise ConfigurationError(
            f"lora_target_modules {list(configuration.lora_target_modules)} match no 2-D weight of"
            f" {configuration.base_model}; try 'all-linear', or module names such as 'q_proj'"
        )
    limit = max(min(layout.shape(name)) for name in targets)
    for node in configuration.nodes:
        rank = node.lora_r or configuration.lora_r
        if rank > limit:
            raise ConfigurationError(
                f"node {node.name!r}: lora_r {rank} exceeds the largest possible rank {limit}"
                f" of the adapted matrices"
            )
    return targets


def largest_rank(configuration: RunConfiguration) -> int:
    """The highest rank that any node trains."""
    return max(node.lora_r or configuration.lora_r for node in configuration.nodes)


def make_plan(
    configuration: RunConfiguration,
    capabilities: Capabilities,
    *,
    round_number: int,
    layout: str,
    base_digest: str,
    action: str = "train",
) -> Plan:
    """The plan of one node for one round (rounds count from 1; the final evaluation is rounds + 1)."""
    preset = PRESETS[configuration.preset]
    node = configuration.node(capabilities.node)
    settings = {} if node is None else node.model_dump(exclude_none=True)
    rank = min(settings.get("lora_r", configuration.lora_r), capabilities.rank_limit)
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA, whose point is that alpha stays. Plain
    # LoRA's alpha grows with the rank, so that all nodes have the scale of lora_alpha / lora_r.
    growth = 1.0 if configuration.lora_rslora else rank / configuration.lora_r
    run = configuration.run_id()
    return Plan.model_validate(
        {
            "run": run,
            "round": round_number,
            "node": capabilities.node,
            "nonce": _digest(run, action, round_number, capabilities.node)[:32],
            "layout": layout,
            "base_model": configuration.base_model,
            "base_digest": base_digest,
            "family": "low_rank",
            "action": action,
            "preset": preset.name,
            "rank": rank,
            "alpha": settings.get("lora_alpha", configuration.lora_alpha * growth),
            "rslora": configuration.lora_rslora,
            "dropout": configuration.lora_dropout,
            "target_modules": configuration.lora_target_modules,
            "init": configuration.lora_init or preset.init,
            "train_a": preset.train_a,
            "start": preset.start,
            "sends": preset.sends,
            "seed": int(_digest(run, "seed", round_number, capabilities.node)[:15], 16),
            "shared_seed": configuration.seed,
            "local_steps": settings.get("local_steps", configuration.local_steps),
            "batch_size": settings.get("micro_batch_size", configuration.micro_batch_size),
            "learning_rate": settings.get("learning_rate", configuration.learning_rate),
            "weight_decay": configuration.weight_decay,
            "warmup_steps": configuration.warmup_steps,
            "max_length": configuration.max_length,
            "dtype": configuration.base_dtype,
            "wire_dtype": configuration.wire_dtype,
            "threads": configuration.threads,
            "accelerate": configuration.accelerate,
            "evaluate": configuration.evaluate,
            "deadline_seconds": configuration.deadline_seconds,
            "max_norm": configuration.max_norm,
            "rank_cap": configuration.view_rank,
            "data": data_specification(configuration),
        }
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256("|".join(str(part) for part in parts).encode()).hexdigest()
