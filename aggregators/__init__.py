"""The algebra of fedbraid: updates as linear objects, their bytes, the gate, and exact sums."""

from aggregators.basis import Basis
from aggregators.carry import Carry
from aggregators.codec import decode, encode
from aggregators.coordinates import coordinates
from aggregators.dense import Dense
from aggregators.gate import Admitted, GateContext, admit, gate, match_targets
from aggregators.layout import Layout, TensorSpec
from aggregators.low_rank import Factors, LowRank
from aggregators.mixing import Aggregate, aggregate, average_factors
from aggregators.projected import ProjectedGradient, allocation
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.update import Update, UpdateRejected, Verdict

__all__ = [
    "Admitted",
    "Aggregate",
    "Basis",
    "Carry",
    "Dense",
    "Factors",
    "GateContext",
    "Layout",
    "LowRank",
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
    "coordinates",
    "decode",
    "encode",
    "gate",
    "match_targets",
]
