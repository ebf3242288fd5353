"""
A certificate authority for the connections between manager and nodes, and for nothing else, in files of one folder.

Certificates follow RFC 5280, with all that Python's strict verification asks for. Keys are on the curve P-256.

Tested in ``tests/unit/cpm/install/test_pki.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import os
import re
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cpm.protocol.errors import Conflict, InvalidRequest, NotFound
from cpm.service import files

CA_DAYS: Final = 3650
DAYS: Final = 730
RENEW_DAYS: Final = 60
"""A certificate that ends sooner is renewed."""
_CA: Final = "ca"
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.IGNORECASE)
_BEFORE: Final = datetime.timedelta(hours=1)
"""Clocks of nodes may be behind."""


@dataclasses.dataclass(frozen=True, slots=True)
class Issued:
    """A certificate."""

    name: str
    certificate: Path
    key: Path
    ends: float | None
    """UTC seconds; None: see ``fault``."""
    fault: str = ""
    """Why it is no certificate of this authority that can be read; empty: it is one."""


class Authority:
    """
    The files of a certificate authority. Each is written as a whole, a key before its certificate: what was killed in
    between goes on with the key that it finds.

    :param folder: ``ca.pem`` and ``ca.key``, and ``NAME.pem`` and ``NAME.key`` for each name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, now: float) -> Issued:
        """
        Make the authority.

        :raise Conflict: When there is one: certificates of a second one would not be believed.
        :raise InvalidRequest: When there is a key without its certificate, and it cannot be read.
        :raise OSError: As all methods that write: when a file cannot be written.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            if self._path(_CA, "pem").exists():
                raise Conflict(f"{self._folder} has an authority already; issue with it, or move it away first")
            key = self._key(_CA)
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "virt-ports")])
            usage = _usage(digital_signature=False, key_cert_sign=True)
            built = (
                _builder(subject, subject, key.public_key(), now, CA_DAYS)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(usage, critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .sign(key, hashes.SHA256())
            )
            self._write(_CA, "pem", built.public_bytes(serialization.Encoding.PEM), 0o644)
        return self._issued(_CA)

    def check_free(self, name: str) -> None:
        """
        Check that a certificate may be issued for a name.

        :raise InvalidRequest: When it is neither a node's name nor an IPv4 address.
        :raise Conflict: When there is one for it.
        """
        _check(name)
        if self._path(name, "pem").exists():
            raise Conflict(f"{name} has a certificate in {self._folder} already; use `virt-ports pki renew {name}`")

    def issue(self, name: str, now: float) -> Issued:
        """
        Issue a certificate with a new key, or with the key that is there without a certificate.

        :param name: A node's name, or the IPv4 address of the manager.
        :raise InvalidRequest: When it is neither, or a file cannot be read.
        :raise Conflict: When there is one for it.
        :raise NotFound: When there is no authority.
        """
        _check(name)
        with self._locked():
            self.check_free(name)
            authority = self._authority()
            self._write(name, "pem", _signed(name, self._key(name).public_key(), authority, now), 0o644)
        return self._issued(name)

    def renew(self, name: str, now: float) -> Issued:
        """
        Issue the certificate of a name again, with the key that it has: so one file changes, at once.

        The key itself is not needed: it may be on its machine only.

        :raise InvalidRequest: When a file cannot be read, or the certificate is of another authority.
        :raise NotFound: When there is neither certificate nor key for it, or no authority.
        """
        _check(name)
        with self._locked():
            authority = self._authority()
            self._write(name, "pem", _signed(name, self._public_key(name), authority, now), 0o644)
        return self._issued(name)

    def due(self, now: float, days: int = RENEW_DAYS) -> list[Issued]:
        """Return the certificates that end within so many days; the authority's own is not among them."""
        found = (each for each in self.issued() if each.name != _CA)
        return [each for each in found if each.ends is not None and each.ends - now < days * 86400]

    def issued(self) -> list[Issued]:
        """
        Return all certificates, the one that ends first at the beginning, after those that cannot be read; the
        authority's own is called ``ca``.

        :raise NotFound: When there is no folder.
        :raise OSError: When it cannot be read.
        """
        try:
            names = [path.name.removesuffix(".pem") for path in self._folder.iterdir() if path.suffix == ".pem"]
        except FileNotFoundError:
            raise NotFound("folder", str(self._folder), "use `virt-ports pki init`") from None
        return sorted(map(self._issued, names), key=lambda each: (each.ends or 0.0, each.name))

    def _authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        if not self._path(_CA, "pem").exists():
            raise NotFound("authority", str(self._folder), "use `virt-ports pki init`")
        if not self._path(_CA, "key").exists():
            remedy = "put the authority's key back, since no other one is believed"
            raise NotFound("key", str(self._path(_CA, "key")), remedy)
        certificate, key = _certificate(self._path(_CA, "pem")), _private(self._path(_CA, "key"))
        if certificate.public_key() != key.public_key():
            raise InvalidRequest(f"{self._folder}/ca.key is not the key of ca.pem beside it; put the right one back")
        return certificate, key

    def _issued(self, name: str) -> Issued:
        path, key = self._path(name, "pem"), self._path(name, "key")
        try:
            certificate = _certificate(path)
            self._check_issuer(certificate, path)
        except InvalidRequest as error:
            return Issued(name, path, key, None, str(error))
        return Issued(name, path, key, certificate.not_valid_after_utc.timestamp())

    def _check_issuer(self, certificate: x509.Certificate, path: Path) -> None:
        """:raise InvalidRequest: When it is of another authority."""
        try:
            certificate.verify_directly_issued_by(_certificate(self._path(_CA, "pem")))
        except (ValueError, TypeError, InvalidSignature):
            raise InvalidRequest(f"{path} is not of this authority; move it away") from None

    def _key(self, name: str) -> ec.EllipticCurvePrivateKey:
        """Return the key of a name; a new one, on disk, if there is none."""
        if self._path(name, "key").exists():
            return _private(self._path(name, "key"))
        key = ec.generate_private_key(ec.SECP256R1())
        self._write(name, "key", _key_text(key), 0o600)
        return key

    def _public_key(self, name: str) -> ec.EllipticCurvePublicKey:
        if self._path(name, "key").exists():
            return _private(self._path(name, "key")).public_key()
        path = self._path(name, "pem")
        if not path.exists():
            raise NotFound("certificate", name, f"use `virt-ports pki issue {name}`")
        certificate = _certificate(path)
        self._check_issuer(certificate, path)
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidRequest(f"{path} has no key on an elliptic curve, so it is not one of ours; move it away")
        return key

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep others from writing meanwhile. :raise NotFound: When there is no folder."""
        try:
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound("authority", str(self._folder), "use `virt-ports pki init`") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{name}.{kind}"

    def _write(self, name: str, kind: str, content: bytes, mode: int) -> None:
        files.replace(self._path(name, kind), content, mode)


def _check(name: str) -> None:
    if name == _CA or len(name) > 253 or not (_address(name) or _NAME.fullmatch(name)):
        raise InvalidRequest(
            f"not a name for a certificate: {name[:80]!r}; use a node's name (letters, digits, hyphens, dots), "
            "or the manager's IPv4 address"
        )


def _address(name: str) -> IPv4Address | None:
    with contextlib.suppress(ValueError):
        return IPv4Address(name)
    return None


def _signed(
    name: str,
    public: ec.EllipticCurvePublicKey,
    authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey],
    now: float,
) -> bytes:
    ca, ca_key = authority
    address = _address(name)
    alternative = x509.IPAddress(address) if address else x509.DNSName(name)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    days = min(DAYS, int((ca.not_valid_after_utc.timestamp() - now) // 86400))
    if days <= 0:
        raise Conflict("the authority's own certificate has ended; move its folder away and begin with a new one")
    built = (
        _builder(subject, ca.subject, public, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True, key_cert_sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: float, days: int
) -> x509.CertificateBuilder:
    begins = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - _BEFORE)
        .not_valid_after(begins + datetime.timedelta(days=days))
    )


def _usage(*, digital_signature: bool, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _key_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} is no certificate that can be read ({error}); move it away") from error


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRequest(f"{path} is no key that can be read ({error}); run this as root") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidRequest(f"{path} is not a key on an elliptic curve, so not one of ours")
    return key
