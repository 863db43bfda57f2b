"""Exports of a run's model: a peft adapter with a model card, or the base merged with the change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aggregators import LowRank
from aggregators.presets import PRESETS
from aggregators.view import View
from fedserver import metrics, quantities
from fedserver.configuration import RunConfiguration
from fedserver.ledger import Ledger, LedgerError
from fedserver.model_line import ModelLine
from fedserver.replay import model_of_round, restore
from fedserver.run_folder import recorded_configuration

WEIGHT = ".weight"
MOST_NAMED = 20
"""Of nodes that added nothing a card names this many."""


def final_change(
    folder: Path, *, exact: bool = False, number: int | None = None
) -> tuple[RunConfiguration, View]:
    """A run's configuration and its change of the base, after round ``number``, by default the newest.

    By default the view that was evaluated (rank up to ``view_rank``); ``exact`` gives the whole carry.
    """
    ledger = Ledger(folder)
    try:
        if ledger.last("round") is None:
            raise LedgerError(f"{folder} has no finished round yet: there is nothing to export")
        configuration = recorded_configuration(ledger)
        if number is None:
            model, _ = restore(ledger, configuration)
        else:
            model = model_of_round(ledger, configuration, number)
    finally:
        ledger.close()
    if exact:
        return configuration, View(model.carry.head(None, None), model.sums, model.whole)
    preset = PRESETS[configuration.preset]
    view = model.common_view(preset, configuration.view_rank, configuration.view_energy)
    return configuration, view


def export_peft(
    folder: Path, target: Path, base_folder: Path, *, exact: bool = False, number: int | None = None
) -> Path:
    """Write a LoRA adapter that plain peft loads (``adapter_model.safetensors`` and its config).

    ``number``: the model after that round, by default the newest.
    """
    configuration, found = final_change(folder, exact=exact, number=number)
    if found.full_rank:
        raise LedgerError(
            f"{folder}: the model's change is more than low-rank factors, so no adapter holds it; use"
            " export merged"
        )
    change = _without_empty(found.adapter)
    if change is None:
        raise LedgerError(f"{folder}: the model's change is zero, so there is no adapter to export")
    transposed = _stored_transposed(base_folder)
    rank = max(change.ranks.values())
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in change.factors.items():
        b = torch.zeros(factors.B.shape[0], rank)
        a = torch.zeros(rank, factors.A.shape[1])
        width = factors.B.shape[1]
        b[:, :width] = (factors.B.double() * factors.scale).float()
        a[:width] = factors.A.float()
        if transposed:
            b, a = a.T, b.T
        path = f"base_model.model.{name.removesuffix(WEIGHT)}"
        tensors[f"{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{path}.lora_B.weight"] = b.contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [name.removesuffix(WEIGHT) for name in change.factors]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_folder),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": modules,
    }
    metrics.write_json(settings, target / "adapter_config.json")
    card = model_card(folder, configuration, rank, number)
    (target / "README.md").write_text(card, encoding="utf-8")
    return target


def export_merged(
    folder: Path, target: Path, base_folder: Path, *, exact: bool = False, number: int | None = None
) -> Path:
    """Write the base with the change added, rounded to its own type once, as a Hugging Face folder.

    ``number``: the model after that round, by default the newest.
    """
    configuration, change = final_change(folder, exact=exact, number=number)
    files = sorted(base_folder.glob("*.safetensors"))
    if not files:
        raise LedgerError(f"{base_folder} holds no safetensors weights to merge into")
    if target.resolve() == base_folder.resolve():
        raise LedgerError("the merged model must not overwrite its base; choose another folder")
    target.mkdir(parents=True, exist_ok=True)
    for extra in base_folder.iterdir():
        if extra.is_file() and extra.suffix != ".safetensors":
            shutil.copy2(extra, target / extra.name)
    merged: set[str] = set()
    adapter = change.adapter.factors if change.adapter is not None else {}
    touched = {*adapter, *(name for one in change.sums for name in one.places)}
    touched |= set(change.whole.tensors) if change.whole is not None else set()
    for file in files:
        weights = load_file(file)
        for name in [n for n in weights if n in touched]:
            weights[name] = change.moved(name, weights[name]).to(weights[name].dtype)
            merged.add(name)
        save_file(weights, target / file.name, metadata={"format": "pt"})
    absent = sorted(touched - merged)
    if absent:
        raise LedgerError(f"{base_folder} stores no tensor named {absent[0]!r}; use export peft")
    card = model_card(folder, configuration, number=number)
    (target / "README.md").write_text(card, encoding="utf-8")
    return target


def model_card(
    folder: Path,
    configuration: RunConfiguration,
    rank: int | None = None,
    number: int | None = None,
) -> str:
    """A model card in Markdown: where the model comes from and what was measured.

    Base, rounds, families and head are the ledger's, up to round ``number`` where one is given; nodes
    and families are of the updates that are in the model, whatever was rolled back. The summary, which a
    finished run has, holds the evaluation of base and model over the same nodes.
    rank: of an adapter; None for merged weights.
    """
    ledger = Ledger(folder)
    try:
        genesis = ledger.last("genesis")
        last = ledger.last("round") if number is None else ledger.round(number)
        line = ModelLine.of(ledger, number)
        families = metrics.families(ledger, line.added)
        evaluated = metrics.last_evaluation(ledger, line)
        answering = metrics.answering(ledger, configuration)
        contributed, others = _nodes(ledger, configuration, line)
        head = ledger.head if number is None or last is None else last.hash
    finally:
        ledger.close()
    rounds = last.round if last is not None else 0
    summary = _read_summary(folder)
    if summary.get("rounds") != rounds:
        # It describes the model of another round.
        summary = {}
    base_digest = str(genesis.content["base_digest"]) if genesis is not None else "unknown"
    text = [
        "---",
        f"base_model: {json.dumps(configuration.base_model)}",
        f"library_name: {'transformers' if rank is None else 'peft'}",
        f"tags: [fedbraid, federated-learning{'' if rank is None else ', lora'}]",
        "---",
        "",
        f"# {configuration.name}",
        "",
        *_made_by(contributed, configuration, rank),
        "",
    ]
    text += [*_evaluation(summary, evaluated, answering), ""]
    done = f"{rounds}" if rounds == configuration.rounds else f"{rounds} of {configuration.rounds}"
    text += [
        f"- base model: {configuration.base_model}, digest `{base_digest}`",
        f"- rounds: {done}{_rolled_back(line, rounds)}",
        f"- nodes: {_of_all(contributed, others)}",
        f"- families of updates: {_families(families)}",
        "- differential privacy: none was used, so no ε and no δ bound what the model may tell about"
        " the nodes' data",
        f"- ledger head{'' if number is None else f' after round {number}'}: `{head}`",
        "",
    ]
    return "\n".join(text)


def _nodes(
    ledger: Ledger, configuration: RunConfiguration, line: ModelLine
) -> tuple[list[str], list[str]]:
    """The nodes whose updates are in the model, and those of the run of which none is.

    In the scenario's order, then those that joined.
    """
    order = dict.fromkeys(node.name for node in configuration.nodes)
    contributed: set[str] = set()
    for entry in ledger.entries("round"):
        order |= dict.fromkeys(metrics.asked_to_train(entry))
        if entry.round in line.added:
            accepted = (row for row in entry.content["nodes"] if row["verdict"] == "accepted")
            contributed.update(one["node"] for row in accepted for one in metrics.trained(row))
    return (
        [name for name in order if name in contributed],
        [name for name in order if name not in contributed],
    )


def _made_by(nodes: list[str], configuration: RunConfiguration, rank: int | None) -> list[str]:
    if not nodes:
        return ["The base model as it was: no update of any node is in it."]
    made = "merged into the base's weights" if rank is None else f"exported at rank {rank}"
    return [
        f"Fine-tuned by {quantities.plural(len(nodes), 'node')} that"
        f" {'shares' if len(nodes) == 1 else 'share'} no data, with fedbraid (preset"
        f" `{configuration.preset}`), then {made}.",
        "",
        "| node | trains | data |",
        "|---|---|---|",
        *(_node_line(name, configuration) for name in nodes),
    ]


def _node_line(name: str, configuration: RunConfiguration) -> str:
    node = configuration.node(name)
    held = ", ".join((node.categories if node else None) or ()) or configuration.data.source
    strand = configuration.strand(name)
    rank = (node.lora_r if node else None) or configuration.lora_r
    return f"| {name} | {f'LoRA, rank {rank}' if strand == 'lora' else strand} | {held} |"


def _of_all(contributed: list[str], others: list[str]) -> str:
    """ "2", or "2 of 3; no update of cafe is in the model"."""
    if not others:
        return f"{len(contributed)}"
    named = ", ".join(others[:MOST_NAMED])
    if len(others) > MOST_NAMED:
        named += f" and {len(others) - MOST_NAMED} more"
    of_all = f"{len(contributed)} of {len(contributed) + len(others)}"
    return f"{of_all}; no update of {named} is in the model"


def _rolled_back(line: ModelLine, rounds: int) -> str:
    """What to say where the rounds are not all in the model."""
    left_out = sorted(set(range(1, rounds + 1)) - line.rounds)
    missed = sorted(line.rounds - line.added)
    told = [f"{quantities.spans_text(left_out)} rolled back"] if left_out else []
    told += [f"{quantities.spans_text(missed)} without a quorum"] if missed else []
    return f" ({', '.join(told)})" if told else ""


def _evaluation(
    summary: dict[str, Any], evaluated: dict[str, Any] | None, answering: int
) -> list[str]:
    """Base and model where both were evaluated; of a run that has not finished the newest loss."""
    before, after = summary.get("before"), summary.get("after")
    if after is None:
        if evaluated is None:
            return ["The model was not evaluated."]
        which = f"the model after round {evaluated['round']}" if evaluated["round"] else "the base"
        return [
            f"Evaluation loss of {which}: {evaluated['loss']:.4f} nats per answer token, over held-out"
            f" examples of {quantities.of_nodes(evaluated['nodes'], answering)}."
        ]
    table = ["| | before | after |", "|---|---|---|"]
    for key, label in (
        ("loss", "evaluation loss"),
        ("perplexity", "perplexity"),
        ("accuracy", "token accuracy"),
    ):
        table.append(f"| {label} | {_number(before, key)} | {_number(after, key)} |")
    nodes = quantities.of_nodes(after["nodes"], answering)
    told = f"Evaluation is over held-out examples of {nodes}, summed by answer token."
    return [*table, "", told]


def _number(scores: dict[str, Any] | None, key: str) -> str:
    return "not measured" if scores is None else f"{scores[key]:.4f}"


def _families(found: dict[str, dict[str, Any]]) -> str:
    """ "low rank (6 from 2 nodes), sketch (6 from 2 nodes)"."""
    told = [
        f"{name.replace('_', ' ')} ({one['updates']} from {quantities.plural(one['nodes'], 'node')})"
        for name, one in sorted(found.items())
    ]
    return ", ".join(told) or "none was accepted"


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _without_empty(change: LowRank | None) -> LowRank | None:
    if change is None:
        return None
    kept = {name: (f.B, f.A, f.scale) for name, f in change.factors.items() if f.B.shape[1] > 0}
    return LowRank(change.layout, kept) if kept else None


def _stored_transposed(base_folder: Path) -> bool:
    """Whether the architecture keeps its linears as Conv1D, [in, out] (GPT-2 and its kin)."""
    path = base_folder / "config.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else ""
    return kind in {"gpt2", "imagegpt", "openai-gpt"}
