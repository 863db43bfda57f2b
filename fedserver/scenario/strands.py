"""The tables of the strands beside LoRA, whose keys are the run's own, and how they mix."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aggregators.messages import WireDtype
from aggregators.methods import Estimator, Objective, Optimiser, Probe, Sampling, Subset
from aggregators.presets import Strand
from aggregators.reach import MOST_BLOCKS
from fedserver.scenario.table import Several, Table, Two


class ZerothOrderConfiguration(Table):
    """Nodes that run forward passes alone and send scalars along probes of one pool of seeds."""

    learning_rate: float = Field(default=1e-6, gt=0)
    probe: Probe = "rank1"
    pool_size: int = Field(default=4096, ge=1, le=1 << 24, description="seeds of the pool")
    estimator: Estimator | Literal["hybrid"] = "spsa"
    objective: Objective = "loss"
    epsilon: float = Field(default=1e-3, gt=0, le=1, description="how far weights are perturbed")
    clip: float | None = Field(default=1000.0, gt=0, description="largest slope that counts whole")
    directions: int = Field(default=1, ge=1, le=64, description="probes of one step")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the estimator momentum")
    trains: Literal["weights", "lora"] = Field(
        default="weights", description="lora: B of rank lora_r, beside an A that a seed stands for"
    )
    target_modules: Several[str] = Field(
        default=(), description="empty: all weights; with lora all-linear"
    )
    layers: Two[int] | None = Field(
        default=None, description="[first, past]: these layers alone, counted from 0"
    )
    cut: int | None = Field(
        default=None, ge=1, description="first layer of backpropagation, of the estimator hybrid"
    )
    blocks: int = Field(
        default=4, ge=2, le=MOST_BLOCKS, description="of layers, of the estimator block-wise"
    )
    density: float = Field(
        default=0.1, gt=0, le=1, description="share of elements, of the estimator sparse"
    )
    sampling: Sampling = Field(
        default="uniform", description="of seeds; magnitude: by the mean size of slopes along each"
    )
    local_steps: int = Field(default=20, ge=1)
    wire_dtype: WireDtype = Field(default="int8", description="of scalars; int8 errs by about 1 %")

    @model_validator(mode="after")
    def _possible(self) -> ZerothOrderConfiguration:
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers {list(self.layers)} are none; [first, past] counts from 0")
        if self.estimator == "hybrid" and (self.trains != "weights" or self.layers is not None):
            raise ValueError(
                "estimator 'hybrid' trains the weights below cut and LoRA above it; leave trains and"
                " layers out"
            )
        if self.cut is not None and self.estimator != "hybrid":
            raise ValueError("cut is of the estimator 'hybrid'; leave it out")
        if self.estimator == "block-wise" and self.pool_size < self.blocks:
            raise ValueError(
                f"pool_size {self.pool_size} has no seed for some of the {self.blocks} blocks"
            )
        return self


class ProjectedConfiguration(Table):
    """Nodes that train weights by backpropagation and send the change projected on probes."""

    learning_rate: float = Field(default=1e-4, gt=0)
    optimiser: Optimiser = "adamw"
    probe: Probe = "rademacher"
    coordinates: int = Field(default=4096, ge=1, le=1 << 24, description="K, over all tensors")
    allocation: Literal["norms", "sizes"] = Field(
        default="norms", description="of K: by the last aggregate's norms, or by the tensors' sizes"
    )
    seeds: Literal["shared", "per-node"] = Field(
        default="shared", description="random probes of a round: everybody's, or each node its own"
    )
    target_modules: Several[str] = Field(default=(), description="empty: all weights")
    scale: Literal["unbiased", "mmse"] = Field(
        default="mmse", description="of random probes: 1/K, or the least mean squared error"
    )
    basis: Literal["adaptive", "random"] = "adaptive"
    rank: int = Field(default=4, ge=1, le=1024, description="of the adaptive basis")
    oversampling: int = Field(default=4, ge=0, le=1024, description="more columns on its left side")
    subset: Subset = Field(default="all", description="which of the weights train in a round")
    subset_share: float = Field(default=0.5, gt=0, le=1)
    gradient_rank: int | None = Field(default=None, ge=1, le=4096, description="GaLore's rank")
    within_basis: bool | None = Field(
        default=None,
        description="train what a sketch in the adaptive basis tells exactly; left out: yes, but with"
        " gradient_rank",
    )
    error_feedback: bool | None = Field(
        default=None,
        description="what a message leaves out is in the node's next one; left out: yes, where one"
        " leaves anything out",
    )

    @model_validator(mode="after")
    def _possible(self) -> ProjectedConfiguration:
        if self.error_feedback is not False and self.scale == "unbiased":
            raise ValueError(
                "scale 'unbiased' diverges with error feedback; error_feedback = false"
            )
        if self.gradient_rank is not None and self.optimiser != "adamw":
            raise ValueError("gradient_rank is of the optimiser 'adamw'")
        if self.gradient_rank is not None and self.within_basis:
            raise ValueError("gradient_rank is of free steps; within_basis = false")
        return self

    @property
    def within(self) -> bool:
        """Whether steps in the adaptive basis stay within it."""
        return self.gradient_rank is None if self.within_basis is None else self.within_basis


class MixingConfiguration(Table):
    """How the families of a round come together."""

    rule: Literal["add", "overlap", "mean"] = Field(
        default="add",
        description="of families; overlap: what two of them changed alike counts once",
    )
    weights: dict[Strand, Annotated[float, Field(ge=0, le=1e6)]] = Field(
        default_factory=dict,
        description="factor of each strand's mean, 1 where none is given; a hybrid node's LoRA part"
        " has that of lora",
    )
