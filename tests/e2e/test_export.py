"""What is exported is what was trained: plain peft and plain transformers give the same logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from aggregators.view import View
from fedserver import events, metrics
from fedserver.configuration import load
from fedserver.export import export_merged, export_peft, final_change
from fedserver.ledger import Ledger, LedgerError
from simulations.run import simulate

TOKENS = torch.arange(4, 44).reshape(2, 20)


@pytest.fixture
def run(tiny_scenario: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "run"
    simulate(load(str(tiny_scenario)), folder, lambda event: None, samples=0)
    return folder


@pytest.mark.parametrize("exact", [False, True])
def test_peft_and_merged_exports_equal_the_base_plus_the_change(
    run: Path, tiny_model_folder: Path, tmp_path: Path, exact: bool
) -> None:
    change = final_change(run, exact=exact)[1].adapter
    assert change is not None
    ours = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    untouched = _logits(ours)
    with torch.no_grad():
        for name, delta in change.dense().items():
            ours.get_parameter(name).add_(delta.float())
    expected = _logits(ours)
    assert (expected - untouched).abs().max() > 1e-2
    adapter = export_peft(run, tmp_path / "adapter", tiny_model_folder, exact=exact)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = PeftModel.from_pretrained(base, str(adapter))
    assert (_logits(tuned) - expected).abs().max() <= 1e-4
    merged = export_merged(run, tmp_path / "merged", tiny_model_folder, exact=exact)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert (_logits(whole) - _logits(tuned)).abs().max() <= 1e-3
    assert "base_model:" in (adapter / "README.md").read_text()


def test_the_card_says_what_the_ledger_says(run: Path, tiny_model_folder: Path) -> None:
    """Of a finished run, and of one that is exported while it goes on."""
    ledger = Ledger(run)
    genesis, height = ledger.last("genesis"), ledger.head
    ledger.close()
    assert genesis is not None
    for _ in range(2):
        card = (export_peft(run, run / "card", tiny_model_folder) / "README.md").read_text()
        for words in (
            genesis.content["base_digest"],
            height,
            "rounds: 3\n",
            "nodes: 2\n",
            "low rank (6 from 2 nodes)",
            "differential privacy: none was used",
        ):
            assert words in card
        assert ("| evaluation loss |" in card) == (run / "summary.json").exists()
        assert ("Evaluation loss of the model after round" in card) != ("| before |" in card)
        (run / "summary.json").unlink(missing_ok=True)


def test_the_exact_export_holds_what_the_view_leaves_out(run: Path) -> None:
    view, whole = (final_change(run, exact=exact)[1].adapter for exact in (False, True))
    assert view is not None
    assert whole is not None
    assert max(view.ranks.values()) == 6
    assert max(whole.ranks.values()) > 6
    assert (whole - view).squared_norm() > 0


def test_a_run_without_a_round_has_nothing_to_export(tmp_path: Path) -> None:
    Ledger(tmp_path, create=True).close()
    with pytest.raises(LedgerError):
        final_change(tmp_path)


def _rank(view: View) -> int:
    assert view.adapter is not None
    return max(view.adapter.ranks.values())


def _logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


def test_what_is_exported_follows_the_ledger_not_an_edited_scenario(
    run: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    scenario = run / "scenario.toml"
    scenario.write_text(scenario.read_text().replace("view_rank = 6", "view_rank = 2"))
    assert "view_rank = 2" in scenario.read_text()
    assert _rank(final_change(run)[1]) == 6
    scenario.unlink()
    configuration, change = final_change(run)
    assert _rank(change) == 6
    assert configuration.base_model == str(tiny_model_folder)


@pytest.mark.parametrize("loss", ["deleted", "changed"])
def test_a_lost_state_is_made_again_from_the_updates(run: Path, loss: str) -> None:
    _, before = final_change(run)
    ledger = Ledger(run)
    last = ledger.last("round")
    assert last is not None
    state = last.content["state"]
    path = run / "blobs" / state[:2] / f"{state}.safetensors"
    if loss == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"changed")
    assert [problem for problem in ledger.verify() if state in problem]
    assert ledger.verify(state=False) == []
    _, after = final_change(run)
    assert after == before
    assert ledger.verify() == []
    ledger.close()


def test_updates_that_do_not_give_the_state_are_a_clear_message(run: Path) -> None:
    ledger = Ledger(run)
    last = ledger.last("round")
    assert last is not None
    ledger.forget(last.content["state"])
    ledger.forget(last.content["nodes"][0]["update"])
    ledger.close()
    with pytest.raises(LedgerError, match="missing"):
        final_change(run)


def test_a_round_is_exported_as_it_was_whatever_came_later(
    tiny_scenario: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Also where the ledger no longer keeps that round's state."""
    folder, card = tmp_path / "run", tmp_path / "adapter" / "README.md"
    newest: dict[int, View] = {}

    def look(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted):
            newest[event.round] = final_change(folder)[1]

    simulate(load(str(tiny_scenario)), folder, look, samples=0)
    assert sorted(newest) == [1, 2, 3]
    ledger = Ledger(folder)
    hashes = {entry.round: entry.hash for entry in ledger.entries("round")}
    kept = {entry.round for entry in ledger.entries("round") if ledger.has(entry.content["state"])}
    losses = {
        round: scored["loss"] for round, scored in metrics.evaluations(ledger).items() if scored
    }
    ledger.close()
    assert 3 in kept
    assert 1 not in kept
    for number, then in newest.items():
        now = final_change(folder, number=number)[1]
        assert then.adapter is not None
        assert now.adapter is not None
        difference = (now.adapter - then.adapter).squared_norm()
        assert difference <= 1e-12 * then.adapter.squared_norm()
        export_peft(folder, card.parent, tiny_model_folder, number=number)
        told = card.read_text()
        assert hashes[number] in told
        assert ("rounds: 3\n" in told) == (number == 3)
        assert (f"rounds: {number} of 3\n" in told) == (number < 3)
        assert f"low rank ({2 * number} from 2 nodes)" in told
        assert f"{losses[number]:.4f}" in told
    with pytest.raises(LedgerError, match="round 4"):
        export_peft(folder, card.parent, tiny_model_folder, number=4)
