"""The server's own certificate authority, and the certificates that it signs.

All keys are on P-256. The authority lives ten years and signs server certificates only (path length 0);
those live 397 days and are made anew when the server comes up with less than 30 days left, or other
names. Devices pin the authority, so they notice nothing of that.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedhost.private_files import make_private_folder, write_private

AUTHORITY_DAYS, SERVER_DAYS, RENEW_DAYS = 3650, 397, 30
# A device's clock may be behind the server's, and TLS judges by it.
BACKDATED = timedelta(days=1)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class CertificateError(Exception):
    """What is wrong with a certificate, and what to do."""


@dataclass(frozen=True)
class Identity:
    """A certificate chain, its private key and the authority that devices pin, as PEM files."""

    certificate: Path
    key: Path
    authority: Path


def make_authority(folder: Path) -> Identity:
    """The authority in ``folder``, made when it is not there yet."""
    make_private_folder(folder)
    identity = Identity(folder / "ca.crt", folder / "ca.key", folder / "ca.crt")
    if identity.key.exists() and identity.certificate.exists():
        return identity
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedbraid authority")])
    public = key.public_key()
    certificate = (
        _builder(name, name, public, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_private(identity.key, _pem(key))
    write_private(identity.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return identity


def make_server_certificate(folder: Path, authority: Identity, names: Sequence[str]) -> Identity:
    """The server's certificate for ``names`` (hosts and addresses; loopback's are always among them)."""
    make_private_folder(folder)
    identity = Identity(folder / "server.crt", folder / "server.key", authority.certificate)
    wanted = sorted({*names, *LOCAL_NAMES})
    if identity.key.exists() and identity.certificate.exists() and _lasts(identity, wanted):
        return identity
    signer = serialization.load_pem_private_key(authority.key.read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedbraid server")])
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in wanted]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    write_private(identity.key, _pem(key))
    write_private(identity.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return identity


def check_given(identity: Identity, now: datetime) -> None:
    """Refuse a given certificate that devices would refuse. Raises CertificateError."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(identity.certificate, identity.key)
        chain = x509.load_pem_x509_certificates(identity.certificate.read_bytes())
        authority = x509.load_pem_x509_certificate(identity.authority.read_bytes())
    except (ssl.SSLError, OSError, ValueError) as error:
        raise CertificateError(f"certificate, key and authority do not fit: {error}") from None
    if chain[0].not_valid_after_utc <= now:
        raise CertificateError(
            f"{identity.certificate} expired on {chain[0].not_valid_after_utc:%Y-%m-%d}: renew it"
        )
    try:
        chain[-1].verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        if chain[-1] != authority:
            raise CertificateError(
                f"{identity.authority} did not sign {identity.certificate}: give the authority that"
                " ends its chain"
            ) from None


def names_in(certificate: Path) -> list[str]:
    """The hosts and addresses that a certificate is for."""
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    found = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = found.get_values_for_type(x509.IPAddress)
    return sorted([*found.get_values_for_type(x509.DNSName), *map(str, addresses)])


def _lasts(identity: Identity, names: list[str]) -> bool:
    loaded = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
    authority = x509.load_pem_x509_certificate(identity.authority.read_bytes())
    remains = loaded.not_valid_after_utc - datetime.now(UTC)
    try:
        loaded.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return remains > timedelta(days=RENEW_DAYS) and names_in(identity.certificate) == names


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in every})


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
