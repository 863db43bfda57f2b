"""A ledger of an older version's rules: its views open, and no state is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedserver.configuration import load
from fedserver.dashboard.run_reader import RunReader
from fedserver.ledger import Ledger, LedgerError
from fedserver.replay import model_after, restore
from fedserver.run_folder import recorded_configuration
from simulations.command import main
from simulations.run import simulate


def command(words: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


@pytest.mark.parametrize(("rules", "which"), [(None, "an older"), (99, "a newer")])
def test_views_open_and_states_are_not_made_again(
    rules: int | None,
    which: str,
    tiny_scenario: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configuration = load(str(tiny_scenario), ["rounds=1", "evaluate=false"])
    simulate(configuration, tmp_path / "now", lambda event: None, samples=0)
    assert command(["ledger", "replay", str(tmp_path / "now")]) == 0
    now, folder = Ledger(tmp_path / "now"), tmp_path / "then"
    then = Ledger(folder, create=True)
    for entry in now.entries():
        content = dict(entry.content)
        if entry.kind == "genesis":
            asked = {**content["configuration"], "rules": rules}
            if rules is None:
                del asked["rules"]
            content["configuration"] = asked
            then.put(now.get(content["layout_blob"]))
        for row in content.get("nodes", ()):
            then.put(now.get(row["update"]))
        if "state" in content:
            then.put(now.get(content["state"]))
        then.append(entry.kind, entry.round, content, entry.wall, entry.signatures)
    # The rules are hashed: taken out, they are missed by who knows the head.
    assert then.head != now.head
    (folder / "scenario.toml").write_text((tmp_path / "now" / "scenario.toml").read_text())

    assert then.verify() == []
    recorded = recorded_configuration(then)
    assert recorded.run_id() == configuration.run_id()
    assert restore(then, recorded)[0].digest() == restore(now, configuration)[0].digest()
    with pytest.raises(LedgerError, match=f"made by {which} version"):
        model_after(then, recorded, 1)
    now.close()
    then.close()
    for words in (["show"], ["verify"], ["likeness", "--round", "1"], ["distances"]):
        assert command(["ledger", words[0], str(folder), *words[1:]]) == 0
    assert RunReader(folder, "then").configuration()["preset"] == configuration.preset
    capsys.readouterr()

    scenario = ["simulate", str(tiny_scenario), "--output", str(folder), "--samples", "0"]
    for words in (
        ["ledger", "replay", str(folder)],
        [*scenario, "--set", "rounds=2", "--set", "evaluate=false", "--resume"],
    ):
        assert command(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"made by {which} version" in line
