"""The algebra of fedbraid: updates as linear objects, their bytes, the gate, and exact sums."""

from aggregators.basis import Basis
from aggregators.carry import Carry
from aggregators.codec import decode, encode
from aggregators.dense import Dense
from aggregators.factor_scalars import FactorScalars
from aggregators.gate import Admitted, GateContext, admit, gate
from aggregators.layout import Layout, TensorSpec
from aggregators.low_rank import Factors, LowRank
from aggregators.mixing import Aggregate, aggregate, average_factors
from aggregators.overlap import gram, overlap_weights
from aggregators.pair import Pair
from aggregators.projected import ProjectedGradient, allocation
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.targets import match_targets
from aggregators.update import Update, UpdateRejected, Verdict

__all__ = [
    "Admitted",
    "Aggregate",
    "Basis",
    "Carry",
    "Dense",
    "FactorScalars",
    "Factors",
    "GateContext",
    "Layout",
    "LowRank",
    "Pair",
    "ProjectedGradient",
    "SeedScalars",
    "Sketch",
    "TensorSpec",
    "Update",
    "UpdateRejected",
    "Verdict",
    "admit",
    "aggregate",
    "allocation",
    "average_factors",
    "decode",
    "encode",
    "gate",
    "gram",
    "match_targets",
    "overlap_weights",
]
