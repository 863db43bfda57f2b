"""A finished run of three families with refusals, made once; and an application over it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedserver import events
from fedserver.configuration import RunConfiguration, parse
from fedserver.dashboard.accounts import OPERATOR, VIEWER, Accounts
from fedserver.dashboard.application import make_application
from fedserver.dashboard.guard import COOKIE

NODES = (
    {"name": "clinic", "description": "workstation", "lora_r": 4},
    {"name": "helpdesk", "fault": "nan"},
    {"name": "school", "strand": "projected", "description": "laptop"},
    {"name": "phone", "strand": "zeroth-order", "description": "phone"},
    {"name": "office", "strand": "projected", "fault": "never"},
    {"name": "cafe", "strand": "zeroth-order", "fault": "late"},
)
PASSWORD = "correct horse battery"


@pytest.fixture(scope="session")
def make_configuration(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., RunConfiguration]]:
    before = os.environ.get("FEDBRAID_CACHE")
    os.environ["FEDBRAID_CACHE"] = str(tmp_path_factory.mktemp("cache"))

    def make(**changes: Any) -> RunConfiguration:
        values: dict[str, Any] = {
            "name": "mixed",
            "base_model": str(tiny_model_folder),
            "preset": "mixed",
            "rounds": 3,
            "threads": 1,
            "seed": 4,
            "quorum": 2,
            "local_steps": 2,
            "max_length": 48,
            "lora_r": 3,
            "view_rank": 6,
            "micro_batch_size": 4,
            "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
            "zeroth_order": {"learning_rate": 1e-3, "pool_size": 64, "local_steps": 3},
            "projected": {"learning_rate": 1e-3, "coordinates": 200},
            "nodes": NODES,
        }
        return parse(values | changes)

    yield make
    os.environ.pop("FEDBRAID_CACHE")
    if before is not None:
        os.environ["FEDBRAID_CACHE"] = before


@pytest.fixture(scope="session")
def finished_run(
    make_configuration: Callable[..., RunConfiguration], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from simulations.run import simulate

    folder = tmp_path_factory.mktemp("finished") / "mixed"
    simulate(make_configuration(signatures="required"), folder, _silent, samples=0)
    return folder


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path) -> Path:
    """A folder with that run in it, to be acted on."""
    shutil.copytree(finished_run, tmp_path / "runs" / "mixed")
    return tmp_path / "runs"


@pytest.fixture
def accounts(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Accounts:
    # What a guess costs is not what these tests are about.
    monkeypatch.setattr("fedserver.dashboard.accounts.SCRYPT_N", 16)
    found = Accounts(runs)
    found.add("olga", OPERATOR, PASSWORD)
    found.add("vera", VIEWER, PASSWORD)
    return found


@pytest.fixture
def client(runs: Path, accounts: Accounts) -> Iterator[TestClient]:
    application = make_application(runs, accounts, hosts=["testserver"])
    with TestClient(application, base_url="https://testserver", follow_redirects=False) as found:
        yield found


@pytest.fixture
def sign_in(client: TestClient) -> Callable[..., str]:
    """Sign in, and the CSRF token of the session."""

    def sign(name: str) -> str:
        answer = client.post("/login", data={"name": name, "password": PASSWORD})
        assert answer.status_code == 303
        session = client.app.state.site.accounts.session(client.cookies[COOKIE])  # type: ignore[attr-defined]
        return str(session.csrf)

    return sign


@pytest.fixture(scope="session")
def openid_issuer() -> Iterator[Any]:
    """A provider that signs with a real RSA key, on a loopback name that is another site's."""
    path = Path(__file__).with_name("openid_provider.py")
    specification = importlib.util.spec_from_file_location("openid_provider", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    issuer = module.Issuer()
    yield issuer
    issuer.server.shutdown()
    issuer.server.server_close()


def _silent(event: events.Event) -> None:
    pass
