"""Which folders a run may begin or go on in."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedserver.configuration import parse
from fedserver.ledger import Ledger, LedgerError
from fedserver.run_folder import check_startable


def test_the_folder_of_another_run_is_found_out_before_anything_starts(tmp_path: Path) -> None:
    """What 'server run' checks first."""
    scenario = parse({"nodes": [{"name": "a"}]})
    folder = tmp_path / "run"
    check_startable(folder, scenario, resume=False)
    with pytest.raises(LedgerError, match="nothing to resume"):
        check_startable(folder, scenario, resume=True)
    ledger = Ledger(folder, create=True)
    content = {"run": scenario.run_id(), "configuration": scenario.identity()}
    ledger.append("genesis", 0, content, {})
    ledger.close()
    check_startable(folder, scenario, resume=True)
    with pytest.raises(LedgerError, match="--resume, or choose another --output"):
        check_startable(folder, scenario, resume=False)
    with pytest.raises(LedgerError, match="another run"):
        check_startable(folder, parse({"nodes": [{"name": "b"}]}), resume=True)
