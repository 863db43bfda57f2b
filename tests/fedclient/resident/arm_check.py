"""The stub on 64-bit ARM: Flower's process of a message, under qemu-user, with a worker of this machine.

    python tests/fedclient/resident/arm_check.py

Fetches Debian's Python for arm64 (into build/arm, by apt-get with an index of its own; nothing is
installed) and the wheels for aarch64 that the stub imports. Then the stub here and the one there ask one
resident worker to say who it is and to train, and must hand over the same bytes. Exits with 1 where they
differ, and with 2, saying what to install, where a tool is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
BUILD = REPOSITORY / "build" / "arm"
PYTHON = f"python3.{sys.version_info.minor}"
# Python itself, and what its modules and the wheels link to.
PACKAGES = (
    f"{PYTHON}-minimal", f"lib{PYTHON}-minimal", f"lib{PYTHON}-stdlib", "libc6", "zlib1g", "libexpat1",
    "libssl3", "libffi8", "libsqlite3-0", "libuuid1", "libbz2-1.0", "liblzma5", "libgcc-s1",
    "libstdc++6", "libcrypt1",
)  # fmt: skip
# What the stub imports that is not Python alone; the rest is taken from this environment.
WHEELS = ("cffi", "cryptography", "grpcio", "numpy", "protobuf", "pycryptodome")
PLATFORMS = ("manylinux2014", "manylinux_2_27", "manylinux_2_28")
ASK = """
import json, pathlib, platform, sys
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
from fedclient.app import app
from fedhost.payloads import from_records, to_records
kind, payload, socket, answer = sys.argv[1:]
config = {"partition-id": 0, "worker": socket}
context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
content = to_records(pathlib.Path(payload).read_bytes())
reply = app(Message(content, dst_node_id=2, message_type=kind), context)
assert not reply.has_error(), reply.error
found = from_records(reply.content)
assert found is not None, dict(reply.content["fedbraid"])
assert "torch" not in sys.modules
pathlib.Path(answer).write_bytes(found)
print(platform.machine())
"""


class MissingTool(Exception):
    """A program that this check needs is not installed, or cannot fetch what it needs."""


def main() -> int:
    """Fetch, run and compare; return the exit status."""
    try:
        emulator = _tool("apt install qemu-user", "qemu-aarch64", "qemu-aarch64-static")
        root, site = _debian(BUILD / "root"), _wheels(BUILD / "site")
    except MissingTool as error:
        print(f"arm-check: {error}", file=sys.stderr)
        return 2
    emulated = [emulator, "-L", str(root), str(root / "usr" / "bin" / PYTHON)]
    packages = [str(Path(p)) for p in sys.path if p.endswith("site-packages")]
    there = {
        **os.environ,
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(site), *packages]),
    }
    here = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryDirectory(prefix="arm") as temporary:
        folder = Path(temporary)
        with _worker(folder / "worker") as socket:
            same = [
                _compare(kind, payload, [emulated, [sys.executable]], [there, here], socket, folder)
                for kind, payload in _questions(folder, socket, here)
            ]
    return 0 if all(same) else 1


def _compare(
    kind: str,
    payload: bytes,
    commands: list[list[str]],
    environments: list[dict[str, str]],
    socket: Path,
    folder: Path,
) -> bool:
    digests, machines = [], []
    for command, environment in zip(commands, environments, strict=True):
        answer, machine = _ask(command, environment, kind, payload, socket, folder)
        digests.append(hashlib.sha256(answer).hexdigest()[:12])
        machines.append(machine)
    equal = len(set(digests)) == 1
    print(f"{kind:6} {machines} {digests}", "equal" if equal else "DIFFERENT", flush=True)
    return equal and machines[0] == "aarch64"


def _ask(
    command: list[str], environment: dict[str, str], kind: str, payload: bytes, socket: Path,
    folder: Path,
) -> tuple[bytes, str]:  # fmt: skip
    asked, answer = folder / "asked", folder / "answer"
    asked.write_bytes(payload)
    done = subprocess.run(
        [*command, "-c", ASK, kind, str(asked), str(socket), str(answer)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    return answer.read_bytes(), done.stdout.strip()


def _questions(folder: Path, socket: Path, environment: dict[str, str]) -> list[tuple[str, bytes]]:
    """A query, and the plan of a round for the node that answered it."""
    from aggregators import Layout
    from aggregators.messages import Capabilities, encode_plan
    from aggregators.view import View
    from fedserver.configuration import load
    from fedserver.planner import make_plan
    from fedserver.roster import query_of
    from simulations.tiny_model import write_scenario

    configuration = load(str(write_scenario(folder / "tiny", 1, 1)))
    query = query_of(configuration)
    told, _ = _ask([sys.executable], environment, "query", query, socket, folder)
    found = Capabilities.from_bytes(told)
    layout = Layout.from_json(found.layout_json)
    plan = make_plan(
        configuration, found, round_number=1, layout=layout, base_digest=found.base_digest
    )
    return [("query", query), ("train", encode_plan(plan, View(), None))]


class _worker:
    """A resident worker of this machine, while it is asked."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "fedclient.resident", "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._socket = folder / "worker.sock"

    def __enter__(self) -> Path:
        assert self._process.stdout is not None
        self._process.stdout.readline()
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def _debian(root: Path) -> Path:
    """Debian's packages for arm64, unpacked."""
    if (root / "usr" / "bin" / PYTHON).exists():
        return root
    apt, unpack = _tool("a Debian or Ubuntu", "apt-get"), _tool("apt install dpkg", "dpkg-deb")
    debs, state = BUILD / "debs", BUILD / "apt"
    for folder in (debs, state / "lists" / "partial", state / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
    }
    command = [apt, "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    for words in (["update"], ["download", *PACKAGES]):
        done = subprocess.run([*command, *words], cwd=debs, capture_output=True, text=True)
        if done.returncode != 0:
            raise MissingTool(f"apt-get {words[0]}: {done.stderr.strip().splitlines()[-1:]}")
    for deb in debs.glob("*.deb"):
        subprocess.run([unpack, "-x", str(deb), str(root)], check=True)
    return root


def _wheels(site: Path) -> Path:
    """Wheels for aarch64 of the versions that are installed here, unpacked."""
    wanted = [f"{name}=={version(name)}" for name in WHEELS]
    stamp = site / "wanted.json"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return site
    wheels = BUILD / "wheels"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels),
        "--only-binary=:all:", "--python-version", f"3.{sys.version_info.minor}",
        *(f"--platform={platform}_aarch64" for platform in PLATFORMS),
    ]  # fmt: skip
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode != 0:
        raise MissingTool(f"pip download: {done.stderr.strip().splitlines()[-1:]}")
    shutil.rmtree(site, ignore_errors=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    stamp.write_text(json.dumps(wanted))
    return site


def _tool(advice: str, *names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    raise MissingTool(f"{names[0]} is missing: {advice}")


if __name__ == "__main__":
    sys.exit(main())
