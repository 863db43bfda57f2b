"""The whole of a scenario, checked across its tables, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from aggregators.messages import WireDtype
from aggregators.methods import BaseFormat, Sampling
from aggregators.presets import PRESETS, STRANDS, Strand
from fedserver.scenario.data import DataConfiguration
from fedserver.scenario.edges import EdgeConfiguration, check_edges
from fedserver.scenario.mistakes import nearest
from fedserver.scenario.nodes import NodeConfiguration
from fedserver.scenario.rounds import RoundKeys
from fedserver.scenario.rules import RULES
from fedserver.scenario.strands import (
    MixingConfiguration,
    ProjectedConfiguration,
    ZerothOrderConfiguration,
)
from fedserver.scenario.table import Several

NON_LINEAR_VARIANTS = {
    "dora": "its magnitude rescales the whole column, so two nodes' changes do not add",
    "vera": "its change is not a free B @ A; frozen shared factors are the preset 'ffa-lora'",
    "adalora": "its singular values are pruned during training, so ranks differ from the plan's",
    "qalora": "it pools the input before A, so the change is not B @ A in the layout",
    "ia3": "it rescales activations instead of adding B @ A",
}
BASE_CHANGING_INITS = {
    "pissa": "it moves a part of the base into the adapter",
    "olora": "it moves a part of the base into the adapter",
    "corda": "it moves a part of the base into the adapter",
    "loftq": "it changes the quantised base",
    "eva": "it needs a pass over the node's activations that this version does not make",
    "previous": "the node's own last A would be lost with a node that restarts",
}


class RunConfiguration(RoundKeys):
    """Everything that decides the numbers of a run, and where they are written."""

    name: str = Field(default="run", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    base_model: str = Field(
        default="smollm2-135m-instruct",
        description="embedded default, a folder, a .gguf, or a hub id",
    )
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    base_format: BaseFormat = Field(
        default="full", description="what nodes hold of the base: all, or quantised linears"
    )
    preset: str = Field(default="braid", description="how updates are made and aggregated")
    rounds: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    output_dir: str | None = Field(default=None, description="run folder; default runs/NAME")

    lora_r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(
        default=16.0, gt=0, description="of rank lora_r; other ranks scale it"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_target_modules: Several[str] = ("all-linear",)
    lora_rslora: bool = False
    lora_init: str | None = Field(default=None, description="random, carry, gaussian, orthogonal")
    lora_variant: str = "lora"

    micro_batch_size: int = Field(default=8, ge=1)
    local_steps: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=1, ge=0)
    max_length: int = Field(default=256, ge=8)

    view_rank: int | None = Field(default=32, ge=1, description="rank of the carry that nodes get")
    view_energy: float | None = Field(default=None, gt=0, le=1)
    view_dtype: WireDtype = "bfloat16"
    wire_dtype: WireDtype = "bfloat16"
    server_learning_rate: float = Field(default=1.0, gt=0)
    evaluate: bool = True
    newcomers: bool = Field(
        default=False,
        description="nodes that the scenario does not name may take part, with data of their own",
    )
    contributions: bool = Field(
        default=False, description="at the end, evaluate the model without each family of updates"
    )

    signatures: Literal["optional", "required"] = Field(
        default="optional",
        description="required: nodes without a key are left out; a node that has one always signs",
    )
    max_norm: float | None = Field(default=1e4, gt=0, description="of one update's change")
    max_update_bytes: int = Field(default=1 << 30, ge=1024)
    max_examples: int = Field(
        default=10_000_000, ge=1, description="weight that one node may claim"
    )
    threads: int = Field(default=2, ge=1, description="per node and server; part of the numbers")
    accelerate: bool = Field(
        default=True, description="nodes train with fused kernels; part of the numbers, by rounding"
    )

    data: DataConfiguration = DataConfiguration()
    zeroth_order: ZerothOrderConfiguration = ZerothOrderConfiguration()
    projected: ProjectedConfiguration = ProjectedConfiguration()
    mixing: MixingConfiguration = MixingConfiguration()
    nodes: Several[NodeConfiguration] = Field(min_length=1)
    edges: Several[EdgeConfiguration] = Field(
        default=(), description="aggregators between nodes and server"
    )

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}{nearest(value, PRESETS)}")
        return value

    @field_validator("lora_variant")
    @classmethod
    def _linear_variant(cls, value: str) -> str:
        if value == "lora":
            return value
        reason = NON_LINEAR_VARIANTS.get(value, "its change is not known to be linear in B @ A")
        raise ValueError(f"{value!r} cannot be aggregated exactly: {reason}; use 'lora'")

    @field_validator("lora_init")
    @classmethod
    def _neutral_init(cls, value: str | None) -> str | None:
        known = ("random", "shared", "carry", "gaussian", "orthogonal")
        if value in BASE_CHANGING_INITS:
            raise ValueError(f"{value!r} is refused: {BASE_CHANGING_INITS[value]}")
        if value is not None and value not in known:
            raise ValueError(f"unknown initialisation {value!r}{nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfiguration:
        names = [node.name for node in self.nodes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"nodes: name {twice[0]!r} is used twice")
        check_edges(self.edges, names)
        if self.edges and PRESETS[self.preset].server == "average_factors":
            raise ValueError(
                f"edges: preset {self.preset!r} averages factors, which is no sum; leave edges out"
            )
        if self.edges and self.asynchronous:
            raise ValueError("edges: an edge answers with the sum of a round; asynchronous = false")
        training = sum(node.trains for node in self.nodes)
        if training == 0:
            raise ValueError("nodes: none of them trains")
        asked = self.participants(training)
        if self.needed(asked) > (training if self.asynchronous else asked):
            which = "train" if asked == training else f"train in a round, of {training}"
            key = "buffer" if self.asynchronous and self.buffer else "quorum"
            raise ValueError(f"{key} {self.needed(asked)} exceeds the {asked} nodes that {which}")
        if self.late == "discount" and PRESETS[self.preset].server == "average_factors":
            raise ValueError(
                f"late: preset {self.preset!r} averages factors, and a part of both is no part of"
                " the change; use 'drop'"
            )
        listed = [node.categories is not None for node in self.nodes]
        if self.data.partition == "categories" and not all(listed):
            missing = names[listed.index(False)]
            raise ValueError(f"data.partition is 'categories', but node {missing!r} lists none")
        if self.data.partition != "categories" and any(listed):
            raise ValueError("nodes list categories: set data.partition = 'categories'")
        if self.server_learning_rate != 1.0 and PRESETS[self.preset].server == "average_factors":
            raise ValueError(
                f"server_learning_rate: preset {self.preset!r} averages factors, and a multiple of"
                " both is no multiple of the change; leave it at 1"
            )
        strand = PRESETS[self.preset].strand
        for node in self.nodes:
            if strand is not None and node.strand not in (None, strand):
                raise ValueError(
                    f"node {node.name!r}: preset {self.preset!r} trains {strand!r} on all nodes; use"
                    " preset 'mixed'"
                )
        if self.sampling == "magnitude" and self.zeroth_order.clip is None:
            raise ValueError(
                "zeroth_order.clip: seeds are drawn by slopes that are cut to it; give a number"
            )
        if self.zeroth_order.estimator == "hybrid" and self.base_dtype != "float32":
            raise ValueError(
                "zeroth_order.estimator 'hybrid' takes small steps in the weights themselves; set"
                ' base_dtype = "float32"'
            )
        self.check_weights()
        self.check_formats()
        if self.lora_init == "carry" and not PRESETS[self.preset].train_a:
            raise ValueError(f"preset {self.preset!r} fixes A, so lora_init cannot be 'carry'")
        return self

    def check_weights(self) -> None:
        """A run of which nothing counts would change nothing."""
        strands = [
            PRESETS[self.preset].strand or n.strand or "lora" for n in self.nodes if n.trains
        ]
        # What a node that chooses for itself sends is found when it chooses.
        families = set(STRANDS if "auto" in strands else strands)
        if "zeroth-order" in families and self.zeroth_order.estimator == "hybrid":
            families.add("lora")
        unweighted = {family for family, weight in self.mixing.weights.items() if weight == 0}
        if families <= unweighted:
            raise ValueError(
                "mixing.weights: every strand of this run has the weight 0, so no round would change the"
                " model; give one of them more"
            )

    def check_formats(self) -> None:
        """A quantised base holds no trained weights, and beside it only rank-1 probes are exact."""
        # What a node that chooses for itself may hold is found when it chooses.
        strands = {n.name: self.strand(n.name) for n in self.nodes if n.strand != "auto"}
        quantised = [name for name in strands if self.base_format_of(name) != "full"]
        for name in quantised:
            if strands[name] == "projected":
                raise ValueError(
                    f"node {name!r}: projected nodes train whole weights; set its base_format = 'full'"
                )
        estimator = self.zeroth_order.estimator if "zeroth-order" in strands.values() else ""
        if quantised and estimator == "sparse":
            raise ValueError(
                "zeroth_order.estimator 'sparse' moves single elements, which no adapter holds beside"
                f" the quantised base of node {quantised[0]!r}; use base_format = 'full'"
            )
        for name in quantised:
            if estimator == "hybrid" and strands[name] == "zeroth-order":
                raise ValueError(
                    f"node {name!r}: zeroth_order.estimator 'hybrid' moves the weights themselves; set"
                    " its base_format = 'full'"
                )
        probes = {
            "zeroth_order.probe": (self.zeroth_order.probe, "zeroth-order"),
            "projected.probe": (self.projected.probe, "projected"),
        }
        if self.basis == "adaptive":
            del probes["projected.probe"]
        for key, (probe, strand) in probes.items():
            if quantised and strand in strands.values() and probe != "rank1":
                raise ValueError(
                    f"{key} {probe!r} cannot stand beside the quantised base of node"
                    f" {quantised[0]!r}; use 'rank1', or base_format = 'full'"
                )

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: the rules, and what the scenario says that decides any."""
        return {"rules": RULES, **self.deciding()}

    def deciding(self) -> dict[str, Any]:
        """All keys but names, places and the number of rounds."""
        return self.model_dump(
            mode="json",
            exclude={
                "name": True,
                "description": True,
                "output_dir": True,
                "rounds": True,
                # Who signed stands beside what was sent, so a deployment has its simulation's head.
                "signatures": True,
                # Who may take part; who did stands in every round.
                "newcomers": True,
                # Sums of sums are exact (EdgeConfiguration): who adds on the way is a matter of place.
                "edges": True,
                # What a device would take is a view of a run, and changes none of its numbers.
                "nodes": {"__all__": {"speed", "link_mbps"}},
            },
        )

    def run_id(self) -> str:
        """128-bit hexadecimal id; equal scenarios have equal ids, whatever runs them, by any rules."""
        return self._run_id

    @cached_property
    def _run_id(self) -> str:
        # Once: every node's plan of every round asks for it, and it is of all nodes.
        canonical = json.dumps(self.deciding(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, which may be another scenario: it works out its own id."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("_run_id", None)
        return copied

    def strand(self, name: str) -> Strand:
        """How a node trains: as the preset says, else as its entry says, else LoRA.

        An entry that leaves it open ("auto") has to be settled before (``device_choice``).
        """
        node = self.node(name)
        asked = node.strand if node else None
        assert asked != "auto", f"the strand of {name!r} is not chosen yet"
        return PRESETS[self.preset].strand or asked or "lora"

    def base_format_of(self, name: str) -> BaseFormat:
        """What a node holds of the base: as its entry says, else the run's."""
        node = self.node(name)
        return (node.base_format if node else None) or self.base_format

    @property
    def sums_stand_beside(self) -> bool:
        """Whether change along probes, if there is some, can be seen beside a quantised base."""
        projected = self.basis == "adaptive" or self.projected.probe == "rank1"
        return self.zeroth_order.probe == "rank1" and projected

    @property
    def basis(self) -> str:
        """What projected nodes see their change through: as the preset says, else the scenario."""
        return PRESETS[self.preset].basis or self.projected.basis

    @property
    def error_feedback(self) -> bool:
        """Whether projected nodes keep what their messages leave out.

        Where steps stay within the basis, messages leave out nothing but rounding.
        """
        asked = self.projected.error_feedback
        return not (self.basis == "adaptive" and self.projected.within) if asked is None else asked

    @property
    def sampling(self) -> Sampling:
        """How zeroth-order nodes draw seeds: as the preset says, else the scenario."""
        return PRESETS[self.preset].sampling or self.zeroth_order.sampling

    @property
    def pool_in_use(self) -> int:
        """Seeds of the run's pool; 0 where no node trains along them."""
        used = any(self.strand(node.name) == "zeroth-order" for node in self.nodes)
        return self.zeroth_order.pool_size if used else 0

    def largest_rank(self) -> int:
        """The highest rank that any node trains."""
        return max(node.lora_r or self.lora_r for node in self.nodes)

    def answering(self) -> int:
        """How many answer the server itself: edges, and nodes that are behind none."""
        return len(self.edges) + len(self.nodes) - sum(len(edge.nodes) for edge in self.edges)

    def minimum_updates(self, without: Collection[str] = ()) -> int:
        """The quorum of a round, by default a majority of the nodes that it asks to train.

        ``without``: nodes that no longer may.
        """
        training = sum(node.trains for node in self.nodes if node.name not in without)
        return self.needed(self.participants(training))

    def names(self, name: str) -> bool:
        """Whether the scenario names a node, or an edge, so."""
        return self.node(name) is not None or any(edge.name == name for edge in self.edges)

    def node(self, name: str) -> NodeConfiguration | None:
        """The entry of one node, None for a node that the scenario does not name."""
        return next((node for node in self.nodes if node.name == name), None)
