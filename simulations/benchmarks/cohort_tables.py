"""Tables of cohorts over seeds: losses, and what mixing gains over each alternative, seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from fedserver.intervals import Estimate, estimate

# Which nodes train, and the rule of mixing.
COHORTS = {
    "mixed, families add": ("all", "add"),
    "mixed, overlap counted once": ("all", "overlap"),
    "mixed, one mean over all": ("all", "mean"),
    "strong nodes alone": ("strong", "add"),
    "weak nodes alone": ("weak", "add"),
}
ALONE = "strong nodes alone"
MIXED = ("mixed, families add", "mixed, overlap counted once")
OTHERS = tuple(cohort for cohort in COHORTS if cohort not in MIXED)


@dataclass(frozen=True)
class Outcome:
    """Losses in nats per answer token: over all nodes' held-out data, and over some nodes'."""

    seed: int
    unlike: bool
    cohort: str
    before: float
    everyone: float
    strong: float


def loss_of(losses: Mapping[str, tuple[float, int]], nodes: Iterable[str]) -> float:
    """Mean over the tokens of some nodes."""
    some = [losses[node] for node in nodes]
    return sum(total for total, _ in some) / sum(tokens for _, tokens in some)


def losses(outcomes: Sequence[Outcome]) -> Table:
    """A cohort a row: loss over all nodes' data, and over the strong nodes'."""
    by = _by_cohort(outcomes)
    seeds = len(by[ALONE])
    before = shown(_estimate([o.before for o in by[ALONE]]))
    found = Table(
        title=f"{_kind(outcomes)} data, {seeds} seeds; before: {before}",
        caption="nats per answer token, mean and 95 % interval over seeds",
    )
    for heading in ("cohort", "all nodes' data", "strong nodes' data", "over the strong alone, %"):
        found.add_column(heading)
    for cohort, mine in by.items():
        found.add_row(
            cohort,
            shown(_estimate([o.everyone for o in mine])),
            shown(_estimate([o.strong for o in mine])),
            "" if cohort == ALONE else _over(mine, by[ALONE]),
        )
    return found


def advantages(outcomes: Sequence[Outcome]) -> Table:
    """How much lower the loss over all nodes' data is than another cohort's, of the same seeds."""
    by = _by_cohort(outcomes)
    found = Table(
        title=f"{_kind(outcomes)} data: lower by, seed by seed",
        caption="mean and 95 % interval of the differences; (n of m): seeds in which it is lower",
    )
    compared = (*OTHERS, MIXED[0])
    for heading in ("cohort", *(f"than {cohort}" for cohort in compared)):
        found.add_column(heading)
    for cohort in MIXED:
        cells = []
        for other in compared:
            less = [o.everyone - m.everyone for o, m in zip(by[other], by[cohort], strict=True)]
            won = f" ({sum(one > 0 for one in less)} of {len(less)})"
            cells.append("" if other == cohort else shown(_estimate(less), "+") + won)
        found.add_row(cohort, *cells)
    return found


def shown(found: Estimate, sign: str = "", digits: int = 3) -> str:
    """Mean and half-width of the interval; the mean alone of one value."""
    width = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f}{width}"


def _over(mine: Sequence[Outcome], alone: Sequence[Outcome]) -> str:
    found = [100 * (o.strong / a.strong - 1) for o, a in zip(mine, alone, strict=True)]
    return f"{shown(_estimate(found), '+', digits=1)} (at most {max(found):+.1f})"


def _by_cohort(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    return {
        cohort: sorted((o for o in outcomes if o.cohort == cohort), key=lambda o: o.seed)
        for cohort in COHORTS
    }


def _estimate(values: Sequence[float]) -> Estimate:
    found = estimate(values)
    assert found is not None, "no outcome of a cohort"
    return found


def _kind(outcomes: Sequence[Outcome]) -> str:
    return "unlike" if outcomes[0].unlike else "like"
