"""How a node is asked to train: one method a family of updates, each with all that decides its numbers.

LoraMethod          low-rank factors by backpropagation             -> LowRank
ZerothOrderMethod   forward passes alone, scalars along probes      -> SeedScalars
FactorMethod        the same, along probes of LoRA's B              -> FactorScalars
HybridMethod        the one below a cut, LoRA above it              -> Pair
ProjectedMethod     backpropagation through weights, projected      -> ProjectedGradient
SketchMethod        the same, seen through the public basis         -> Sketch
CohortMethod        each device of an edge in its own way           -> Cohort
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aggregators.factor_scalars import LARGEST_RANK, lora_scale
from aggregators.reach import MOST_BLOCKS, Reach
from aggregators.targets import Layers

# What leaves the base as it is; peft's other initialisations move a part of it into the adapter.
Initialisation = Literal["random", "shared", "carry", "previous", "gaussian", "orthogonal"]
Probe = Literal["rademacher", "popcount", "gaussian", "rank1"]
Estimator = Literal[
    "spsa", "forward-gradient", "fzoo", "sign", "momentum", "adam", "conservative", "block-wise",
    "sparse",
]  # fmt: skip
Objective = Literal["loss", "accuracy", "exact-match", "rouge-l"]
Sampling = Literal["uniform", "magnitude"]
Optimiser = Literal["sgd", "adamw"]
# What a node holds of the base: all of it, or its linears in so few bits and embeddings in eight.
BaseFormat = Literal["full", "int8", "int4", "nf4"]
Subset = Literal["all", "owlore", "hft", "green-trainer"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Of one tensor's random probes.
MOST_COORDINATES = 1 << 20
Modules = tuple[str, ...]


class _Method(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraMethod(_Method):
    """A LoRA adapter of ``rank`` on ``target_modules``; the rest is the preset's way of doing it.

    ``layers``: those [first, past) alone are adapted.
    """

    family: Literal["low_rank"] = "low_rank"
    target_modules: Modules
    layers: Layers = None
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    rslora: bool
    dropout: float = Field(ge=0, lt=1)
    init: Initialisation
    train_a: bool
    start: Literal["fresh", "view"]
    sends: Literal["factors", "delta"]
    shared_seed: Seed
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)

    @property
    def scale(self) -> float:
        """s in the change s B A: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, 2023)."""
        return lora_scale(self.alpha, self.rank, self.rslora)

    @property
    def label(self) -> str:
        """What the node sends, in a word or two."""
        return f"rank {self.rank}"


class ZerothOrderMethod(_Method):
    """Steps along probes of a pool that the run shares (MeZO, Malladi et al., 2023; FedKSeed).

    A step draws ``directions`` probes z, measures g = (l(W + epsilon z) - l(W - epsilon z)) / (2
    epsilon) along each, and moves by what ``estimator`` makes of the g. A g beyond ``clip`` is cut to
    it. ``target_modules`` () means all weights. ``sampling``: how probes are drawn, "magnitude" by the
    mean |g| along each so far (FedKSeed-Pro); it needs a clip, and statistics go with the update.

    ``layers``: those [first, past) alone are trained. With "block-wise" the pool is divided over
    ``blocks`` of layers, and a step's probes are of one of them; with "sparse" a ``density`` of every
    tensor's elements is trained (``aggregators.reach``).
    """

    family: Literal["seed_scalars"] = "seed_scalars"
    target_modules: Modules = ()
    master_seed: Seed
    pool_size: int = Field(ge=1, le=1 << 24)
    probe: Probe
    estimator: Estimator = "spsa"
    objective: Objective = "loss"
    epsilon: float = Field(gt=0, le=1)
    clip: float | None = Field(gt=0)
    directions: int = Field(default=1, ge=1, le=64)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    sampling: Sampling = "uniform"
    layers: Layers = None
    blocks: int = Field(default=4, ge=2, le=MOST_BLOCKS)
    density: float = Field(default=0.1, gt=0, le=1)

    @property
    def reach(self) -> Reach:
        """What of the tensors each probe moves."""
        return Reach(
            self.blocks if self.estimator == "block-wise" else 1,
            self.density if self.estimator == "sparse" else 1.0,
        )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sampling == "magnitude" and self.clip is None:
            raise ValueError("sampling 'magnitude' needs a clip: what it sums is cut to it")
        if self.estimator == "block-wise" and self.pool_size < self.blocks:
            raise ValueError(f"a pool of {self.pool_size} seeds has none for some of the blocks")
        return self

    @property
    def label(self) -> str:
        """What the node sends, in a word or two."""
        return f"{self.pool_size:,} seeds"


class FactorMethod(ZerothOrderMethod):
    """The same along probes of LoRA's B of ``rank`` on ``target_modules``, with a public A.

    The base is frozen. ``scale``: s in the change s B A; ``shared_seed``: what A stands for. All nodes
    have one rank and one A: only then do their scalars add.
    """

    family: Literal["factor_scalars"] = "factor_scalars"  # type: ignore[assignment]
    rank: int = Field(ge=1, le=LARGEST_RANK)
    scale: float = Field(gt=0, lt=1e6)
    shared_seed: Seed

    @property
    def label(self) -> str:
        """What the node sends, in a word or two."""
        return f"{self.pool_size:,} seeds, rank {self.rank}"


class HybridMethod(_Method):
    """Zeroth-order steps below a cut, backpropagation above it (ZO-Bench, Zhang et al., 2024).

    ``lower`` trains weights of the layers below the cut and ``upper`` LoRA factors of those from it on,
    at ``upper_learning_rate``; every step does both, at one point. Backpropagation ends at the cut, so
    nothing below it keeps activations.
    """

    family: Literal["pair"] = "pair"
    lower: ZerothOrderMethod
    upper: LoraMethod
    upper_learning_rate: float = Field(gt=0)

    @property
    def label(self) -> str:
        """What the node sends, in a word or two."""
        return f"{self.lower.label}, {self.upper.label}"


class FirstOrderMethod(_Method):
    """Backpropagation through the weights of ``target_modules`` (() means all).

    ``subset`` chooses among them, anew each round, those that are trained; the others need no
    gradients and no optimiser state. ``subset_share`` in (0, 1] is how much of them:

        all             every one
        owlore          layers, drawn by the share of outliers in their weights (OwLore, Li et al., 2024)
        hft             half of every group of like parameters (HFT, Hui et al., 2024); no share
        green-trainer   those of the largest gain for a share of the backward pass's operations
                        (GreenTrainer, Huang et al., 2024)

    With ``gradient_rank`` AdamW's moments of a matrix are kept in so many leading directions of its
    gradient (GaLore, Zhao et al., 2024): "owlore" with it is the paper's method.

    ``error_feedback``: what a message does not carry is added to the node's next change.
    """

    target_modules: Modules
    master_seed: Seed
    optimiser: Optimiser
    error_feedback: bool
    subset: Subset = "all"
    subset_share: float = Field(default=0.5, gt=0, le=1)
    gradient_rank: int | None = Field(default=None, ge=1, le=4096)

    @model_validator(mode="after")
    def _has_moments(self) -> Self:
        if self.gradient_rank is not None and self.optimiser != "adamw":
            raise ValueError("gradient_rank is for the optimiser 'adamw', which has moments")
        return self


class ProjectedMethod(FirstOrderMethod):
    """The change is projected on random probes (Ferret, Shu et al., 2024).

    ``coordinates``: K by tensor name, from what the server knows: ``aggregators.allocation``. The
    probes are those of ``master_seed``, another one each round. ``scale``: "unbiased" is 1/K, as in
    the paper; "mmse" is shorter and nearest (``ProjectedGradient.shrunk``). Error feedback needs the
    latter: with the former what is left is longer than what was sent, and grows without bound.
    """

    family: Literal["projected_gradient"] = "projected_gradient"
    probe: Probe
    coordinates: dict[str, Annotated[int, Field(ge=1, le=MOST_COORDINATES)]]
    scale: Literal["unbiased", "mmse"] = "mmse"

    @model_validator(mode="after")
    def _contracts(self) -> Self:
        if self.error_feedback and self.scale == "unbiased":
            raise ValueError("error feedback needs the scale 'mmse'; 'unbiased' diverges with it")
        return self

    @property
    def label(self) -> str:
        """What the node sends, in a word or two."""
        return f"K {sum(self.coordinates.values()):,}"


class SketchMethod(FirstOrderMethod):
    """The change is seen in the public basis (``aggregators.Basis``).

    ``rank`` columns on the right, ``rank + oversampling`` on the left, and more in the first round. The
    basis comes with the plan, or from ``master_seed`` where the run has none yet.

    ``within``: every step is one that a sketch in the basis tells exactly, so nothing is left out; else
    steps are free, and what is sent is what the basis shows of their sum. The former has its own
    moments, a few directions each, and no others.
    """

    family: Literal["sketch"] = "sketch"
    rank: int = Field(ge=1, le=1024)
    oversampling: int = Field(ge=0, le=1024)
    within: bool = False

    @model_validator(mode="after")
    def _has_one_kind_of_moments(self) -> Self:
        if self.within and self.gradient_rank is not None:
            raise ValueError("gradient_rank is of free steps; within a basis moments are its own")
        return self

    @property
    def label(self) -> str:
        """What the node sends, in a word or two."""
        return f"sketch {self.rank}"


DeviceMethod = Annotated[
    LoraMethod | ZerothOrderMethod | FactorMethod | HybridMethod | ProjectedMethod | SketchMethod,
    Field(discriminator="family"),
]
# A device's name, and the nonce and the seed of its plan.
MemberPlan = tuple[
    Annotated[str, Field(min_length=1, max_length=64)],
    Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")],
    Seed,
]


class CohortGroup(_Method):
    """Devices whose plans differ in name, nonce and seed alone.

    ``view``: digest of the view that they get; ``sent``: which of the views in the edge's message that
    is (``messages.encode_cohort_plan``). ``history``: as of ``messages.Plan``.
    """

    action: Literal["train", "evaluate"]
    method: DeviceMethod
    local_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    base_format: BaseFormat
    wire_dtype: str | None
    view: str = Field(pattern=r"^([0-9a-f]{64})?$")
    sent: str = Field(pattern=r"^[0-9a-f]{64}$")
    history: tuple[str, ...] = ()
    members: tuple[MemberPlan, ...] = Field(min_length=1)


class CohortMethod(_Method):
    """What an edge aggregator is asked: to ask its devices, and to answer with the sum.

    ``max_bytes``, ``max_examples``: of one device's reply.
    """

    family: Literal["cohort"] = "cohort"
    groups: tuple[CohortGroup, ...] = Field(min_length=1)
    max_bytes: int = Field(default=1 << 30, ge=1024)
    max_examples: int = Field(default=10**7, ge=1)

    @property
    def names(self) -> list[str]:
        """Of all devices, group by group."""
        return [name for group in self.groups for name, _, _ in group.members]

    @property
    def label(self) -> str:
        """What the edge sends, in a word or two."""
        return f"sum of {len(self.names)}"


Method = Annotated[
    LoraMethod
    | ZerothOrderMethod
    | FactorMethod
    | HybridMethod
    | ProjectedMethod
    | SketchMethod
    | CohortMethod,
    Field(discriminator="family"),
]


def label(method: Method, base_format: BaseFormat) -> str:
    """What a node sends, and on what it works where that is not the whole base."""
    return method.label if base_format == "full" else f"{method.label} on {base_format}"
