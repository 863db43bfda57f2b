"""A device that pins the authority accepts its server, for its names, and nobody else."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedserver.deployment.certificates import (
    CertificateError,
    Identity,
    check_given,
    make_authority,
    make_server_certificate,
    names_in,
)


def shake_hands(identity: Identity, authority: Path, name: str) -> None:
    """A TLS handshake in memory; raises ssl.SSLCertVerificationError where the client refuses."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(identity.certificate, identity.key)
    client_context = ssl.create_default_context(cafile=str(authority))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_the_certificate_is_for_its_names_and_loopback(tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "authority")
    identity = make_server_certificate(tmp_path / "own", authority, ["fed.example.org", "10.0.0.7"])
    for name in ("fed.example.org", "10.0.0.7", "localhost", "127.0.0.1", "::1"):
        shake_hands(identity, authority.certificate, name)
    for name in ("example.org", "10.0.0.8"):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(identity, authority.certificate, name)


def test_another_authority_of_the_same_name_is_no_authority(tmp_path: Path) -> None:
    authority, other = (make_authority(tmp_path / name) for name in ("authority", "other"))
    identity = make_server_certificate(tmp_path / "own", authority, [])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(identity, other.certificate, "localhost")


def test_files_are_kept_while_they_last_and_others_cannot_read_them(tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "authority")
    identity = make_server_certificate(tmp_path / "own", authority, ["a.example"])
    made = identity.certificate.read_bytes(), authority.certificate.read_bytes()
    assert make_authority(tmp_path / "authority") == authority
    make_server_certificate(tmp_path / "own", authority, ["a.example"])
    assert (identity.certificate.read_bytes(), authority.certificate.read_bytes()) == made
    make_server_certificate(tmp_path / "own", authority, ["b.example"])
    assert "b.example" in names_in(identity.certificate)
    for file in (identity.key, identity.certificate, authority.key, authority.certificate):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_given_certificate_has_to_fit(tmp_path: Path) -> None:
    authority, other = (make_authority(tmp_path / name) for name in ("authority", "other"))
    own = make_server_certificate(tmp_path / "own", authority, [])
    now = datetime.now(UTC)
    check_given(own, now)
    with pytest.raises(CertificateError):
        check_given(Identity(own.certificate, own.key, other.certificate), now)
    with pytest.raises(CertificateError):
        check_given(Identity(own.certificate, other.key, authority.certificate), now)
    with pytest.raises(CertificateError):
        check_given(Identity(own.certificate, tmp_path / "none", authority.certificate), now)
    with pytest.raises(CertificateError):
        check_given(own, now + timedelta(days=398))
