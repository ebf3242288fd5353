"""
Certificates, by a handshake with oneself; and the manager on another machine, by a handshake with it.

Both ends of the first handshake are in this process, so OpenSSL says of a certificate, its key and its CA what the peer
would say. Tested in ``tests/unit/machine_doctor/test_readers.py``.
"""

from __future__ import annotations

import email.utils
import http.client
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cpm.service import certificates as certificates_
from machine_doctor.facts import CertificateFacts, RemoteManager, Setup, Unread

_TIMEOUT_S: Final = 3.0
_LIMIT: Final = 1 << 16


def certificates(setup: Setup) -> tuple[CertificateFacts, ...] | Unread:
    """Return the certificates that the configuration names."""
    found: list[CertificateFacts] = []
    unread: list[str] = []
    natd, cpmd = setup.natd, setup.cpmd
    wanted = []
    if natd is not None and natd.manager.certificate and natd.manager.key and natd.manager.ca:
        wanted.append(("node", natd.manager.certificate, natd.manager.key, natd.manager.ca))
    if cpmd is not None and cpmd.listen.address and cpmd.listen.certificate and cpmd.listen.key and cpmd.listen.ca:
        wanted.append(("manager", cpmd.listen.certificate, cpmd.listen.key, cpmd.listen.ca))
    for kind, certificate, key, authority in wanted:
        try:
            found.append(examine(kind, certificate, key, authority))
        except PermissionError as error:
            unread.append(f"cannot read {error.filename or key}: {error.strerror}; run this with sudo")
    return Unread(unread[0]) if unread else tuple(found)


def examine(kind: str, certificate: str, key: str, authority: str) -> CertificateFacts:
    """
    Check a certificate as its peer does.

    :param kind: ``node`` or ``manager``: what the peer lets it be used for.
    :raise PermissionError: When a file may not be read.
    """
    for path in (certificate, key, authority):
        try:
            Path(path).open("rb").close()
        except PermissionError:
            raise
        except OSError as error:
            return CertificateFacts(certificate, kind, (), None, f"cannot read {path}: {error.strerror}")
    is_server = kind == "manager"
    try:
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        ours.load_cert_chain(certificate, key)
        ours.check_hostname = False
        ours.verify_mode = ssl.CERT_NONE
        peer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_server else ssl.PROTOCOL_TLS_SERVER)
        peer.check_hostname = False
        peer.verify_mode = ssl.CERT_REQUIRED
        peer.load_verify_locations(authority)
        ends = certificates_.earliest_end(peer)
        if not is_server:
            # A server needs a certificate, whatever it is: a client that verifies nothing does not look at it.
            peer.load_cert_chain(certificate, key)
        shown = certificates_.handshake(ours, peer) if is_server else certificates_.handshake(peer, ours)
    except ssl.SSLCertVerificationError as error:
        return CertificateFacts(certificate, kind, (), None, error.verify_message)
    except ssl.SSLError as error:
        return CertificateFacts(certificate, kind, (), None, certificates_.words(error))
    names = tuple(value for kind_, value in shown.get("subjectAltName", ()) if kind_ in ("DNS", "IP Address"))
    if not shown.get("subjectAltName"):
        names = tuple(value for part in shown["subject"] for kind_, value in part if kind_ == "commonName")
    return CertificateFacts(certificate, kind, names, ssl.cert_time_to_seconds(shown["notAfter"]), "", ends)


def remote_manager(setup: Setup, now: Callable[[], float]) -> RemoteManager | Unread | None:
    """Connect to the manager on another machine with this node's certificate; ask it for nothing but its time."""
    if setup.natd is None or not setup.natd.manager.url.startswith("https://"):
        return None
    manager = setup.natd.manager
    from cpm.api.session import tls_context  # takes long to import, and is needed here only

    assert manager.certificate is not None
    assert manager.key is not None
    try:
        context = tls_context(manager.certificate, manager.key, manager.ca or "")
    except PermissionError as error:
        return Unread(f"cannot read the node's key: {error.strerror}; run this with sudo")
    except (OSError, ssl.SSLError) as error:
        return RemoteManager(manager.url, f"this node's certificate cannot be used: {error}")
    address = urlsplit(manager.url)
    try:
        port = address.port or 443
    except ValueError:
        return RemoteManager(manager.url, "there is no such port")
    connection = http.client.HTTPSConnection(address.hostname or "", port, context=context, timeout=_TIMEOUT_S)
    try:
        asked = now()
        connection.request("HEAD", "/")
        response = connection.getresponse()
        answered = now()
        response.read(_LIMIT)
    except ssl.SSLCertVerificationError as error:
        return RemoteManager(manager.url, f"its certificate is refused: {error.verify_message}")
    except (OSError, http.client.HTTPException) as error:
        return RemoteManager(manager.url, _network_words(error))
    finally:
        connection.close()
    date = email.utils.parsedate_to_datetime(response.headers["Date"]) if response.headers.get("Date") else None
    offset = None if date is None else _offset(date.timestamp(), asked, answered)
    return RemoteManager(manager.url, "", offset)


def _offset(date: float, asked: float, answered: float) -> float:
    """Return by how much a date, which is cut to whole seconds, is outside the time of the answer."""
    if asked - 1 <= date <= answered:
        return 0.0
    return date + 0.5 - (asked + answered) / 2


def _network_words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_S:.0f} s"
    if isinstance(error, socket.gaierror):
        return f"its name is not known ({error.strerror})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
