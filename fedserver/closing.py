"""What is measured when the rounds are over: the last model's loss, and what each family is worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aggregators import Verdict
from fedserver import events, metrics
from fedserver.configuration import RunConfiguration
from fedserver.global_model import GlobalModel
from fedserver.ledger import Ledger
from fedserver.outcome import (
    Outcome,
    evaluations_by_format,
    memory_by_node,
    row,
    seconds_by_node,
    signatures,
    sum_evaluations,
)
from fedserver.replay import without

Asking = Callable[[int, GlobalModel], list[Outcome]]
"""Has every node evaluate a model; the number is the question's, beyond those of the rounds."""


def evaluate_last(
    ledger: Ledger,
    configuration: RunConfiguration,
    model: GlobalModel,
    ask: Asking,
    emit: events.Listener,
) -> None:
    """Ask every node for the loss of the model that the last round produced, unless it is recorded."""
    if any(entry.round == configuration.rounds for entry in ledger.entries("evaluation")):
        return
    emit(events.Notice("info", "final evaluation of the global model on every node"))
    outcomes, wall = _answers(ask, configuration.rounds + 1, model)
    accepted = [o for o in outcomes if o.verdict is Verdict.ACCEPTED]
    entering = sum_evaluations(accepted)
    content = {
        "entering": entering,
        "entering_by_format": evaluations_by_format(accepted),
        "nodes": [row(outcome) for outcome in outcomes],
    }
    ledger.append("evaluation", configuration.rounds, content, wall, signatures(outcomes))
    evaluated = metrics.evaluation_done(configuration.rounds, entering)
    if evaluated is not None:
        emit(evaluated)


def measure_contributions(
    ledger: Ledger, configuration: RunConfiguration, ask: Asking, emit: events.Listener
) -> None:
    """Ask for the loss of the model without each family; recorded as "ablation" entries."""
    families = sorted(metrics.families(ledger))
    done = {
        entry.content["without"]
        for entry in ledger.entries(metrics.ABLATION)
        if entry.round == configuration.rounds
    }
    if len(families) < 2:
        return
    for place, family in enumerate(families):
        if family in done:
            continue
        words = family.replace("_", " ")
        emit(events.Notice("info", f"evaluation of the model without {words} updates"))
        model = without(ledger, configuration, family)
        outcomes, wall = _answers(ask, configuration.rounds + 2 + place, model)
        accepted = [o for o in outcomes if o.verdict is Verdict.ACCEPTED]
        entering = sum_evaluations(accepted)
        content = {
            "without": family,
            "entering": entering,
            "nodes": [row(outcome) for outcome in outcomes],
        }
        ledger.append(metrics.ABLATION, configuration.rounds, content, wall, signatures(outcomes))


def _answers(ask: Asking, number: int, model: GlobalModel) -> tuple[list[Outcome], dict[str, Any]]:
    """What the nodes say of a model, and the clocks and memory of it."""
    started = time.time()
    outcomes = ask(number, model)
    return outcomes, {
        "started": started,
        "seconds": time.time() - started,
        "nodes": seconds_by_node(outcomes),
        "memory": memory_by_node(outcomes),
    }
