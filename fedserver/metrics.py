"""Views of a ledger as numbers: one line a round, and the summary. Derived, so never out of step."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aggregators import Layout
from aggregators.messages import Evaluation
from fedserver import events
from fedserver.configuration import RunConfiguration
from fedserver.device_cost import device_seconds
from fedserver.ledger import Entry, Ledger
from fedserver.model_line import ModelLine, rolled_back_to

FP32_BYTES = 4
EVALUATED = tuple(Evaluation.model_fields)


ABLATION = "ablation"  # the kind of an entry: an evaluation of the model without one family


def rows(ledger: Ledger, configuration: RunConfiguration) -> list[dict[str, Any]]:
    """One dictionary a round. ``eval_loss`` is of the model that the round produced.

    The evaluation of a round's model arrives with the next round's replies or with the final
    evaluation, so the newest round of an unfinished run has None there.
    """
    entering = evaluations(ledger)
    lines = []
    for entry in ledger.entries("round"):
        line, names = round_row(entry, entering.get(entry.round)), asked_to_train(entry)
        lines.append(line)
        for node in line["nodes"]:
            asked = configuration.node(node["node"])
            node["categories"] = ", ".join((asked.categories if asked else None) or ())
            node["device_seconds"] = device_seconds(
                asked, node["seconds"] or 0.0, node["bytes_up"] + node["bytes_down"]
            )
        # The round is over when the last device has answered; an asynchronous one may ask nobody.
        line["device_seconds"] = max((n["device_seconds"] for n in line["nodes"]), default=0.0)
        line["asked_ranks"] = sum(_rank(configuration, name) for name in names)
    return lines


def evaluations(ledger: Ledger) -> dict[int, dict[str, Any] | None]:
    """Round number -> scores of the model after that round; 0 is the base model.

    They are of all ``nodes`` that evaluated it (an edge, which adds up its devices' sums, is one), each
    on what it holds of the base; ``by_format`` has the loss of each kind.
    """
    found: dict[int, dict[str, Any] | None] = {}
    model = 0
    for entry in ledger.entries():
        if entry.kind == "round":
            # A model that came back by a roll-back is evaluated again; the first time counts.
            if found.get(model) is None:
                found[model] = _entering(entry)
            model = entry.round
        elif entry.kind == "evaluation":
            found[entry.round] = _entering(entry)
        elif (target := rolled_back_to(entry)) is not None:
            model = target
    return found


def last_evaluation(ledger: Ledger, line: ModelLine) -> dict[str, Any] | None:
    """``round`` and scores of the newest model that was evaluated, of those that the run's came by.

    None where not even the base model was.
    """
    known = {number: one for number, one in evaluations(ledger).items() if one is not None}
    number = max(known.keys() & {0, *line.rounds}, default=None)
    return None if number is None else {"round": number, **known[number]}


def answering(ledger: Ledger, configuration: RunConfiguration) -> int:
    """How many nodes, and edges for theirs, the run has: the scenario's, and those that joined."""
    behind = {node for edge in configuration.edges for node in edge.nodes}
    names = {node.name for node in configuration.nodes} - behind
    names |= {edge.name for edge in configuration.edges}
    for entry in ledger.entries("round"):
        names |= {node["node"] for node in entry.content["nodes"]}
    return len(names)


def _entering(entry: Entry) -> dict[str, Any] | None:
    whole = scores(entry.content["entering"])
    if whole is None:
        return None
    parts = {f: scores(sums) for f, sums in entry.content["entering_by_format"].items()}
    nodes = sum(sums["tokens"] > 0 for sums in _reported(entry).values())
    by_format = {f: part["loss"] for f, part in parts.items() if part}
    return whole | {"nodes": nodes, "by_format": by_format}


def round_row(entry: Entry, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """The metrics line of one ledger entry."""
    nodes = entry.content["nodes"]
    accepted = [node for node in nodes if node["verdict"] == "accepted"]
    losses = [(n["share"], n["report"]["train_loss"]) for n in accepted if n["share"] > 0]
    known = [(share, loss) for share, loss in losses if loss is not None]
    weight = sum(share for share, _ in known)
    return {
        "round": entry.round,
        "quorum": entry.content["quorum"],
        "loss": sum(share * loss for share, loss in known) / weight if weight else None,
        "eval_loss": evaluation["loss"] if evaluation else None,
        "eval_accuracy": evaluation["accuracy"] if evaluation else None,
        "eval_by_format": evaluation["by_format"] if evaluation else None,
        "bytes_up": sum(node["bytes_up"] for node in nodes),
        "bytes_down": sum(node["bytes_down"] for node in nodes),
        "seconds": entry.wall["seconds"],
        "families": dict(Counter(one["family"] for node in accepted for one in trained(node))),
        "asked": len(asked_to_train(entry)),
        "asked_ranks": None,
        "accepted": len(accepted),
        "rejected": len(nodes) - len(accepted),
        "verdicts": dict(sorted(Counter(node["verdict"] for node in nodes).items())),
        "epsilon": None,
        "carry_rank": entry.content["carry_rank"],
        "tail_energy": entry.content["tail_energy"],
        "head": entry.hash,
        "device_seconds": None,
        # Last, so that a reader of the round alone can stop here: there may be thousands.
        "nodes": [_node_row(node, entry) for node in nodes],
    }


def scores(sums: dict[str, Any] | None) -> dict[str, Any] | None:
    """Loss, perplexity and token accuracy from token sums; None when nothing was evaluated.

    ``new_loss`` is over examples that no row of their node's training data repeats; None where that is
    all of them, or none.
    """
    if sums is None or not sums["tokens"]:
        return None
    loss = sums["loss_sum"] / sums["tokens"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sums["correct"] / sums["tokens"],
        "tokens": sums["tokens"],
        "examples": sums["examples"],
        "new_loss": sums["new_loss_sum"] / sums["new_tokens"]
        if 0 < sums["new_tokens"] < sums["tokens"]
        else None,
        "new_tokens": sums["new_tokens"],
    }


def families(ledger: Ledger, among: Collection[int] | None = None) -> dict[str, dict[str, Any]]:
    """By family of updates: nodes, accepted updates, bytes, seconds of work, and what it adds.

    ``among``: of these rounds, by default of all, whatever became of the model.
    ``weight``: what its mean was multiplied by, on average over rounds; None where nothing came in.
    ``contribution``: by how many nats a token the loss would be higher without the family's updates;
    None where that was not evaluated.
    """
    found: dict[str, dict[str, Any]] = {}
    weights: dict[str, list[float]] = {}
    for entry in ledger.entries("round"):
        if among is not None and entry.round not in among:
            continue
        for family, weight in entry.content["mixing"].get("weights", {}).items():
            weights.setdefault(family, []).append(weight)
        for node in entry.content["nodes"]:
            if node["verdict"] != "accepted":
                continue
            for update in trained(node):
                one = found.setdefault(
                    update["family"],
                    {"nodes": set(), "updates": 0, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0},
                )
                one["nodes"].add(update["node"])
                one["updates"] += 1
                one["bytes_up"] += update["bytes_up"]
                one["bytes_down"] += update["bytes_down"]
                one["seconds"] += entry.wall["nodes"].get(update["node"]) or 0.0
    last = ledger.last("evaluation")
    whole = scores(last.content["entering"]) if last is not None else None
    for entry in ledger.entries(ABLATION):
        lost = scores(entry.content["entering"])
        family = entry.content["without"]
        if whole and lost and last is not None and entry.round == last.round and family in found:
            found[family]["contribution"] = lost["loss"] - whole["loss"]
    return {
        family: one
        | {
            "nodes": len(one["nodes"]),
            "weight": statistics.fmean(weights[family]) if family in weights else None,
            "contribution": one.get("contribution"),
        }
        for family, one in sorted(found.items())
    }


def summarise(
    ledger: Ledger, configuration: RunConfiguration, layout: Layout, targets: Sequence[str]
) -> dict[str, Any]:
    """The run in one dictionary: before, after, bytes against the two obvious baselines.

    ``before`` and ``after`` are of the same nodes; ``eval_loss`` is the newest, of all who answered.
    """
    lines, line = rows(ledger, configuration), ModelLine.of(ledger)
    before, after = _before_and_after(ledger)
    genesis = ledger.last("genesis")
    assert genesis is not None
    a_node, a_rank = baselines(layout, targets)
    return {
        "name": configuration.name,
        "preset": configuration.preset,
        "seed": configuration.seed,
        "base_model": configuration.base_model,
        "base_digest": genesis.content["base_digest"],
        "layout": layout.fingerprint,
        "rounds": len(lines),
        "rounds_with_quorum": sum(line["quorum"] for line in lines),
        "rounds_without_quorum": [line["round"] for line in lines if not line["quorum"]],
        "model_round": line.model,
        "nodes": len(configuration.nodes),
        "answering": answering(ledger, configuration),
        "before": before,
        "after": after,
        "eval_loss": next(
            (line["eval_loss"] for line in reversed(lines) if line["eval_loss"] is not None), None
        ),
        "last_evaluation": last_evaluation(ledger, line),
        "families": families(ledger),
        "bytes_up": _bytes(ledger, "bytes_up"),
        "bytes_down": _bytes(ledger, "bytes_down"),
        "bytes_full_model": a_node * sum(line["asked"] for line in lines),
        "bytes_full_lora": a_rank * sum(line["asked_ranks"] for line in lines),
        "seconds": sum(entry.wall["seconds"] for entry in _messages(ledger)),
        "device_seconds": sum(line["device_seconds"] for line in lines),
        "device_memory": max(
            (node["memory_bytes"] for line in lines for node in line["nodes"]), default=0
        ),
        "head": ledger.head,
        "version": _version(),
    }


def shortfall(summary: Mapping[str, Any]) -> str:
    """What to say of a run whose last rounds, or all of them, had no quorum; "" of any other."""
    rounds, missed = summary["rounds"], set(summary["rounds_without_quorum"])
    reached = rounds
    while reached in missed:
        reached -= 1
    if reached == rounds:
        return ""
    if not reached:
        return (
            f"none of {rounds} rounds got the updates that it needs, so the model is the base model"
        )
    model = summary["model_round"]
    which = f"round {rounds}" if reached == rounds - 1 else f"rounds {reached + 1} to {rounds}"
    left = f"as round {model} left it" if model else "the base model"
    if model == reached:
        return f"{which} missed the quorum, so the model is {left}"
    return f"{which} missed the quorum; the model was rolled back, and is {left}"


def finished(
    summary: Mapping[str, Any],
    *,
    seconds: float | None = None,
    report: str = "",
    adapter: str = "",
) -> events.RunFinished:
    """The end of a run as an event. ``seconds``: of the whole run, by default of its rounds."""
    newest = summary["last_evaluation"] if summary["after"] is None else None
    return events.RunFinished(
        before=_evaluation(summary["before"]),
        after=_evaluation(summary["after"]),
        seconds=summary["seconds"] if seconds is None else seconds,
        head=summary["head"],
        report=report,
        adapter=adapter,
        bytes_up=summary["bytes_up"],
        bytes_down=summary["bytes_down"],
        without_quorum=tuple(summary["rounds_without_quorum"]),
        rounds=summary["rounds"],
        evaluated=_evaluation(newest),
        evaluated_round=newest["round"] if newest else events.BASE_ROUND,
        families=tuple(
            events.FamilyWork(
                family=family,
                nodes=work["nodes"],
                bytes_up=work["bytes_up"],
                bytes_down=work["bytes_down"],
                seconds=work["seconds"],
                contribution=work["contribution"],
            )
            for family, work in summary["families"].items()
        ),
    )


def evaluation_done(
    round_number: int, found: dict[str, Any] | None
) -> events.EvaluationDone | None:
    """The news of a model's loss; None where nobody has evaluated it."""
    told = scores(found)
    if told is None:
        return None
    return events.EvaluationDone(
        round=round_number,
        loss=told["loss"],
        perplexity=told["perplexity"],
        accuracy=told["accuracy"],
        tokens=told["tokens"],
    )


def _evaluation(found: Mapping[str, Any] | None) -> events.Evaluation | None:
    if found is None:
        return None
    return events.Evaluation(
        loss=found["loss"],
        perplexity=found["perplexity"],
        accuracy=found["accuracy"],
        tokens=found["tokens"],
        new_loss=found["new_loss"],
        new_tokens=found["new_tokens"],
    )


def nothing_learnt(summary: Mapping[str, Any], folder: Path) -> str | None:
    """What to say of a run whose last rounds taught the model nothing; None of any other."""
    short = shortfall(summary)
    if not short:
        return None
    return f"{short}: 'fedbraid ledger show {folder}' says why; mend the nodes or lower quorum"


def baselines(layout: Layout, targets: Sequence[str]) -> tuple[int, int]:
    """Bytes up and down in float32: of a node that exchanges all weights, and a unit of LoRA's rank."""
    weights = sum(math.prod(tensor.shape) for tensor in layout.tensors)
    return 2 * FP32_BYTES * weights, 2 * FP32_BYTES * sum(
        sum(layout.shape(name)) for name in targets
    )


def write(ledger: Ledger, configuration: RunConfiguration, path: Path) -> None:
    """Write ``metrics.jsonl`` anew, atomically: a reader never sees half a line."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows(ledger, configuration))
    _replace(path, text)


def write_json(value: Any, path: Path) -> None:
    """Write one JSON document atomically."""
    _replace(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _bytes(ledger: Ledger, direction: str) -> int:
    return sum(node[direction] for entry in _messages(ledger) for node in entry.content["nodes"])


def _messages(ledger: Ledger) -> list[Entry]:
    """What nodes were asked: all rounds, and the evaluations at the end."""
    kinds = ("round", "evaluation", ABLATION)
    return [entry for kind in kinds for entry in ledger.entries(kind)]


def _before_and_after(ledger: Ledger) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Scores of the base and of the last model over the nodes that evaluated both.

    A node that was refused in the first round would otherwise stand on one side only.
    """
    first = next(iter(ledger.entries("round")), None)
    last = ledger.last("evaluation")
    if first is None or last is None:
        return None, None
    sides = [_reported(first), _reported(last)]
    common = sorted(set(sides[0]) & set(sides[1]))
    found = []
    for side in sides:
        told = scores({key: sum(side[node][key] for node in common) for key in EVALUATED})
        nodes = sum(side[node]["tokens"] > 0 for node in common)
        found.append(None if told is None else told | {"nodes": nodes})
    return found[0], found[1]


def _reported(entry: Entry) -> dict[str, dict[str, Any]]:
    """By node, its sums over the model that an entry's question held; a late answer is of another."""
    return {
        node["node"]: node["report"]["evaluation"]
        for node in entry.content["nodes"]
        if node["verdict"] == "accepted"
        and not node.get("staleness")
        and node["report"].get("evaluation") is not None
    }


def asked_to_train(entry: Entry) -> list[str]:
    """The nodes that a round asked to train, those behind an edge too; whatever came of it."""
    found = []
    for node in entry.content["nodes"]:
        plan = node["plan"]
        if node["round"] != entry.round or plan["action"] != "train":
            continue
        groups = plan["method"].get("groups")
        if groups is None:
            found.append(node["node"])
        else:
            training = (group["members"] for group in groups if group["action"] == "train")
            found += [member[0] for members in training for member in members]
    return found


def _rank(configuration: RunConfiguration, name: str) -> int:
    node = configuration.node(name)
    return (node.lora_r if node is not None else None) or configuration.lora_r


def trained(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes whose updates came with an accepted row: itself, or those behind an edge."""
    if "members" not in node:
        return [node] if "family" in node else []
    return [m for m in node["members"] if m["verdict"] == "accepted" and m["family"] is not None]


def _node_row(node: dict[str, Any], entry: Entry) -> dict[str, Any]:
    report = node.get("report") or {}
    measured = entry.wall["memory"].get(node["node"], {})
    return {
        "node": node["node"],
        "family": node["plan"]["method"]["family"],
        "sends": node["sends"],
        "base_format": node["base_format"],
        "choice": node["choice"],
        "examples": report.get("examples"),
        "weight": node["share"],
        "train_loss_first": report.get("train_loss_first"),
        "train_loss": report.get("train_loss"),
        "bytes_up": node["bytes_up"],
        "bytes_down": node["bytes_down"],
        "seconds": entry.wall["nodes"].get(node["node"]),
        "verdict": node["verdict"],
        "reason": node["reason"],
        "staleness": entry.round - node["round"],
        "norm": node.get("norm"),
        "memory_bytes": node["memory_bytes"],
        "memory_grown": measured.get("grown"),
        "memory_peak": measured.get("resident"),
        "memory_accelerator": measured.get("accelerator"),
    }


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version() -> str:
    try:
        return version("fedbraid")
    except PackageNotFoundError:
        return "unknown"
