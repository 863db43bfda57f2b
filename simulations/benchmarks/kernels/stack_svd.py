"""`fk.stack_svd` against the SVD of the dense sum."""

from __future__ import annotations

from simulations.benchmarks.kernels.row import Row
from simulations.benchmarks.recompression import BASELINE, Case, Measurement, compare


def rows(quick: bool) -> list[Row]:
    """Measure 4096 x 4096, R 160 -> 64; the dense SVD, which takes a quarter of a minute, if not quick.

    Every method runs in a process of its own with one thread, as in the recompression benchmark.
    """
    case = Case()
    methods = ["gram", "qr"] if quick else ["gram", "qr", BASELINE]
    found = {measurement.method: measurement for measurement in compare(case, methods, repeats=3)}
    dense = found.pop(BASELINE, None)
    return [_row(case, measurement, dense) for measurement in found.values()]


def _row(case: Case, measurement: Measurement, dense: Measurement | None) -> Row:
    extra: dict[str, float | str] = {
        "error / optimum − 1": measurement.error / measurement.optimum - 1
    }
    if measurement.extra_bytes is not None:
        extra["extra memory / stack"] = measurement.extra_bytes / case.stack_bytes
    stack_rank = sum(case.ranks)
    return Row(
        family="stack_svd",
        name=f"{measurement.method} {case.size}², R {stack_rank} → {case.rank}, 1 thread",
        seconds=measurement.seconds,
        reference_seconds=dense.seconds if dense else None,
        reference="dense + full SVD, fp32" if dense else "",
        target="≥ 500 ×",
        extra=extra,
    )
