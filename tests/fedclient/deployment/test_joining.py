"""A device's folder as it joins and leaves, and what it is told when the server's certificate does not
hold by its own clock.
"""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from fedclient.deployment.joining import inquire, join
from fedclient.deployment.settings import NodeFile, NodeFolder, NodeFolderError
from fedclient.keys import load_or_create
from fedclient.resident.flower import node_environment
from fedhost.enrolment import EnrolmentRefused, Token
from fedhost.ports import LOOPBACK
from fedhost.private_files import write_private
from fedserver.deployment import certificates
from fedserver.deployment.certificates import Identity, make_authority, make_server_certificate
from simulations.command import main


def told_by(identity: Identity, authority: Path, folder: Path) -> EnrolmentRefused:
    """What a device with that authority hears from a server with that certificate."""
    node = NodeFolder(folder)
    folder.mkdir()
    node.transport_key()
    node.authority.write_bytes(authority.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    with socket.create_server((LOOPBACK, 0)) as listening:
        node.write(NodeFile(f"{LOOPBACK}:{listening.getsockname()[1]}", "clinic", "0" * 64, {}))

        def serve() -> None:
            with suppress(OSError), context.wrap_socket(listening.accept()[0], server_side=True):
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(EnrolmentRefused) as refusal:
            inquire(node)
        thread.join()
    return refusal.value


def test_a_certificate_out_of_time_is_the_clocks_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = make_authority(tmp_path / "authority")
    other = make_authority(tmp_path / "other").certificate
    hour = timedelta(hours=1)
    monkeypatch.setattr(certificates, "BACKDATED", -hour)
    early = make_server_certificate(tmp_path / "early", authority, [])
    monkeypatch.setattr(certificates, "BACKDATED", 2 * hour)
    monkeypatch.setattr(certificates, "SERVER_DAYS", -hour / timedelta(days=1))
    late = make_server_certificate(tmp_path / "late", authority, [])
    for name, identity, words in (("1", early, "not valid yet"), ("2", late, "has expired")):
        told = told_by(identity, authority.certificate, tmp_path / name)
        assert told.kind == "wrong-clock"
        assert words in str(told)
        assert "this device's clock says 2" in str(told)
    foreign = told_by(early, other, tmp_path / "3")
    assert foreign.kind == "wrong-authority"


def test_a_new_server_is_accepted_by_a_device_that_is_half_a_day_slow(tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "authority")
    identity = make_server_certificate(tmp_path / "own", authority, [])
    for file in (authority.certificate, identity.certificate):
        validity = ssl._ssl._test_decode_cert(str(file))  # type: ignore[attr-defined]
        begins = ssl.cert_time_to_seconds(validity["notBefore"])
        assert begins < file.stat().st_mtime - timedelta(hours=12).total_seconds()


@pytest.mark.parametrize("own", [[], ["--data", "notes.jsonl", "--partition", "0"]])
def test_a_device_says_what_it_trains_on(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "node"
    command = ["client", "join", "https://127.0.0.1:1", "--token", "fb1-x", "--folder", str(folder)]
    with pytest.raises(SystemExit) as end:
        main([*command, *own])
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert "--data" in told
    assert "--partition" in told
    assert not folder.exists()


def joined(path: Path) -> NodeFolder:
    """A folder as join and run leave it."""
    folder = NodeFolder(path)
    folder.transport_key()
    load_or_create(folder.update_key_file)
    for file in (folder.authority, folder.superexec_secret, path / "status.json"):
        write_private(file, "")
    folder.write(NodeFile(f"{LOOPBACK}:1", "clinic", "0" * 64, {}))
    node_environment(path)
    for name in ("logs", "worker"):
        (path / name).mkdir()
    for name in ("logs/worker.log", "logs/worker.log.1", "worker/worker.lock", "keys/.transport.7"):
        (path / name).touch()
    return folder


@pytest.mark.parametrize(
    "own", ["notes.jsonl", "logs/diary.txt", "keys/other", "bin/tool", "photos/one.jpg"]
)
def test_leaving_deletes_what_the_program_made_and_nothing_else(own: str, tmp_path: Path) -> None:
    folder = joined(tmp_path / "node")
    mine = folder.path / own
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert folder.delete() == [Path(own).parts[0]]
    assert [one for one in folder.path.rglob("*") if one.is_file()] == [mine]
    mine.unlink()
    assert joined(tmp_path / "other").delete() == []
    assert not (tmp_path / "other").exists()


def test_a_join_takes_a_new_folder_or_that_of_a_join_that_was_cut_off(tmp_path: Path) -> None:
    token = str(Token(bytes(24), bytes(32)))
    url = f"https://{LOOPBACK}:1"  # nobody listens there
    cut_off = NodeFolder(tmp_path / "cut")
    cut_off.transport_key()
    load_or_create(cut_off.update_key_file)
    write_private(cut_off.authority, "")
    for folder in (NodeFolder(tmp_path / "new"), cut_off):
        with pytest.raises(EnrolmentRefused) as refusal:
            join(url, token, folder, {})
        assert refusal.value.kind == "unreachable"
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    (home / "notes.jsonl").touch()
    with pytest.raises(NodeFolderError, match=r"notes\.jsonl"):
        join(url, token, NodeFolder(home), {})
    assert home.stat().st_mode & 0o777 == 0o755
    (cut_off.path / "keys" / "other").touch()
    with pytest.raises(NodeFolderError, match="keys/other"):
        join(url, token, cut_off, {})
