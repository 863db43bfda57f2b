"""What terminal, report and card say of a run that operators have acted on."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedserver import events, metrics
from fedserver.configuration import RunConfiguration, load
from fedserver.control import ControlQueue
from fedserver.export import model_card
from fedserver.ledger import Ledger
from fedserver.ledger_command import ledger_app
from fedserver.live_log import LIVE
from fedserver.model_line import ModelLine
from fedserver.run_folder import recorded_configuration
from simulations.engines import run_local
from simulations.live_drawing import summary_panel
from simulations.progress import RunProgress
from simulations.report import report_html
from simulations.run_directory import read_run

WHY = "the loss rose \x1b[2J<b>"
Run = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def run(tiny_scenario: Path, tmp_path: Path) -> Run:
    """A run of two nodes, asked what stands under a round's number when that round is committed.

    ``away``: the rounds in which "strong" does not answer.
    """

    def make(
        asked: dict[int, list[tuple[str, dict[str, Any]]]],
        faults: dict[str, str] | None = None,
        away: Sequence[int] = (),
        **overrides: object,
    ) -> tuple[Path, dict[str, Any]]:
        words = [f"{key}={value}" for key, value in {"local_steps": 1, **overrides}.items()]
        found = load(str(tiny_scenario), words).model_dump(mode="json", exclude_none=True)
        for node in found["nodes"]:
            node["fault"] = (faults or {}).get(node["name"])
            node["away"] = away if node["name"] == "strong" else ()
        configuration = RunConfiguration.model_validate(found)
        folder = tmp_path / "run"

        def listen(event: events.Event) -> None:
            if isinstance(event, events.RoundCommitted):
                for action, arguments in asked.get(event.round, ()):
                    ControlQueue(folder).ask(
                        action, arguments, who="eve", role="operator", reason=WHY
                    )

        run_local(configuration, folder, listen)
        return folder, json.loads((folder / "summary.json").read_text())

    return make


def page_of(folder: Path) -> str:
    """The words of the report, one space apart."""
    words: list[str] = []
    parser = HTMLParser()
    parser.handle_data = words.append  # type: ignore[method-assign]
    parser.feed(report_html(read_run(folder)))
    return " ".join(" ".join(words).split())


def card_of(folder: Path, number: int | None = None) -> str:
    ledger = Ledger(folder)
    configuration = recorded_configuration(ledger)
    ledger.close()
    return model_card(folder, configuration, number=number)


def test_a_model_that_was_rolled_back_is_said_to_be(run: Run) -> None:
    """Back to round 1 before round 4; from there on one node is left, and does not answer."""
    acted = [("rollback", {"round": 1}), ("drain", {"node": "weak"})]
    folder, summary = run({3: acted}, away=(4, 5), rounds=5, quorum=1)
    said = metrics.shortfall(summary)
    assert "rounds 4 to 5" in said
    assert "as round 1 left it" in said
    assert json.loads((folder / LIVE).read_text())["reason"] == said
    page = page_of(folder)
    for words in ("roll-back to round 1", "drain weak", "eve", "operator", "the loss rose"):
        assert words in page
    html = report_html(read_run(folder))
    # In the wide drawing and in the narrow one, and in the description of each.
    assert len(re.findall(r'<path class="mark"', html)) == 2
    assert page.count("before round 4 back to round 1") == 2
    assert "fedbraid ledger replay run" in page
    assert "ends with the same ledger head" not in page
    # "weak" was drained, so the model at the end was evaluated by the other alone.
    assert summary["after"]["nodes"] == 1
    assert "of 1 of 2 nodes" in page
    assert "of all nodes" not in page
    card = card_of(folder)
    assert "over held-out examples of 1 of 2 nodes" in card
    assert "rounds: 5 (rounds 2 to 3 rolled back, rounds 4 to 5 without a quorum)" in card
    assert "low rank (2 from 2 nodes)" in card
    # The report, which reads files of rounds, follows the same line as the ledger's readers.
    ledger = Ledger(folder)
    line, seen = ModelLine.of(ledger), read_run(folder).line()
    ledger.close()
    assert (line.model, line.added, line.rounds) == (1, {1}, {1, 4, 5})
    assert (seen.model, seen.added, seen.rounds) == (line.model, line.added, line.rounds)
    # What is exported of round 3 is what it was then.
    assert "low rank (6 from 2 nodes)" in card_of(folder, 3)


def test_back_to_the_base_model_is_the_base_model(run: Run) -> None:
    acted = [("rollback", {"round": 0}), ("drain", {"node": "weak"})]
    folder, summary = run({1: acted}, away=(2,), rounds=2, quorum=1)
    assert "base model" in metrics.shortfall(summary)
    card = card_of(folder)
    assert "no update of any node is in it" in card
    assert "nodes: 0 of 2" in card


def test_a_run_that_was_stopped_names_its_last_evaluation_and_who_added_to_it(run: Run) -> None:
    """ "weak" is refused in every round, and stopped for good before the third."""
    asked = {2: [("revoke", {"node": "weak"})], 3: [("stop", {})]}
    folder, summary = run(asked, {"weak": "nan"}, rounds=6, quorum=1)
    assert (summary["rounds"], summary["after"]) == (3, None)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] is not None for line in lines] == [True, True, False]
    told = summary["last_evaluation"]
    assert (told["round"], told["loss"]) == (2, lines[1]["eval_loss"])
    page, card = page_of(folder), card_of(folder)
    assert "not evaluated in this run" not in page
    assert "This run was not evaluated" not in page
    assert "the model after round 2, the last that was evaluated" in page
    assert f"{told['loss']:.3f}" in page
    end = metrics.finished(summary)
    with_it = RunProgress(run=events.RunStarted("tiny", "braid", 6, 1, (), "model", str(folder)))
    terminal = Console(width=120, file=io.StringIO())
    terminal.print(summary_panel(with_it, end))
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "stopped after round 3 of 6" in drawn
    assert f"{told['loss']:.3f} after round 2" in drawn
    assert f"after round 2: {told['loss']:.4f}" in card
    assert "of 1 of 2 nodes" in card
    assert "rounds: 3 of 6\n" in card
    assert "Fine-tuned by 1 node " in card
    assert "| weak |" not in card
    assert "nodes: 1 of 2; no update of weak is in the model" in card
    assert "low rank (3 from 1 node)" in card
    assert "One node fine-tuned" in page
    assert "Adapter none in the run folder" in page


def test_the_ledger_is_shown_with_what_operators_did(run: Run) -> None:
    acted = [("drain", {"node": "weak"}), ("next_round", {"deadline_seconds": 7.5})]
    folder, _ = run({1: acted}, rounds=2, quorum=1)
    shown = CliRunner().invoke(ledger_app, ["show", str(folder)], env={"COLUMNS": "200"}).stdout
    for words in ("drain weak", "next round: deadline 7.5 s", "eve (operator)", "the loss rose"):
        assert words in shown
    assert "\x1b[2J" not in shown
