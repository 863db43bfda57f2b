"""Flower by hand: a SuperLink and two SuperNodes on loopback end with the in-process engine's head.

The deployed nodes sign with keys that they made themselves; those of the in-process engine have none.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from aggregators.keys import load as load_key
from aggregators.keys import public_hex
from fedserver.configuration import load
from fedserver.ledger import Ledger
from simulations.run import ledger_head, simulate

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 240.0


def test_a_loopback_deployment_ends_with_the_local_engines_head(
    tiny_scenario: Path, tmp_path: Path
) -> None:
    overrides = ["rounds=1", "local_steps=2"]
    configuration = load(str(tiny_scenario), overrides)
    simulate(configuration, tmp_path / "local", lambda event: None, samples=0)
    deployed = tmp_path / "deployed"
    home = tmp_path / "flower"
    home.mkdir()
    port, log = _free_port(), tmp_path / "log"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    with ExitStack() as processes, log.open("w") as output:
        start = lambda *command: processes.enter_context(_process(home, output, *command))  # noqa: E731
        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
              "--disable-runtime-dependency-installation")  # fmt: skip
        _wait_for(lambda: _listens(port), log)
        for index in range(len(configuration.nodes)):
            own = f'partition-id={index} key="{tmp_path / f"node-{index}.pem"}"'
            start("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                  "--port", str(_free_port()), "--node-config", own)  # fmt: skip
        overrides.append("signatures=required")
        sealing_key = tmp_path / "server.pem"
        settings = f'scenario="{tiny_scenario}" output="{deployed}" set="{";".join(overrides)}"'
        settings += f' server-key="{sealing_key}"'
        subprocess.run(
            [_program("flwr"), "run", str(REPOSITORY), "loop", "--run-config", settings],
            env=_environment(home), stdout=output, stderr=output, check=True,
        )  # fmt: skip
        _wait_for((deployed / "summary.json").is_file, log)
    assert ledger_head(deployed) == ledger_head(tmp_path / "local")
    ledger = Ledger(deployed)
    assert ledger.verify(key=public_hex(load_key(sealing_key))) == []
    made = {public_hex(load_key(path)) for path in tmp_path.glob("node-*.pem")}
    signed = {one["key"] for entry in ledger.entries("round") for one in entry.signatures.values()}
    assert signed == made
    ledger.close()


@contextmanager
def _process(home: Path, output: object, *command: str) -> Iterator[None]:
    process = subprocess.Popen(
        [_program(command[0]), *command[1:]],
        env=_environment(home), stdout=output, stderr=output, start_new_session=True,  # type: ignore[call-overload]
    )  # fmt: skip
    try:
        yield
    finally:
        # The SuperLink and the SuperNodes start processes of their own for the apps.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(condition: object, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        assert "Traceback" not in log.read_text(), log.read_text()[-6000:]
        time.sleep(0.25)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
    }
