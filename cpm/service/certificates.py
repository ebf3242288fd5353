"""
TLS certificates that are followed on disk.

When the files change, the next handshake shows the new certificate and believes the new CA. OpenSSL gives a connection
its certificate when the handshake begins, so nothing that is open ends: not when a file is replaced, and not when the
certificate with which it was opened ends.

Tested in ``tests/unit/cpm/service/test_certificates.py``.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

log = logging.getLogger(__name__)

FOLLOW_S: Final = 10.0
"""Seconds between two looks at the files."""

_NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which Python has no name."""
_ROUNDS: Final = 20


class Files(NamedTuple):
    """Where certificate, key and CA are: PEM files."""

    certificate: str
    key: str
    ca: str | None = None


class LiveContext:
    """
    A TLS context that follows its files.

    :param name: What it is for, in logs and metrics: the table of the settings that names the files.
    :param build: Makes a context from the files; raises OSError (:class:`ssl.SSLError` is one) when they are no good.
    :param is_server: Whether it is shown to clients.
    :raise OSError: When the files cannot be used now.
    """

    def __init__(self, name: str, files: Files, build: Callable[[], ssl.SSLContext], *, is_server: bool) -> None:
        self.name = name
        self._files = files
        self._build = build
        self._is_server = is_server
        self._said = ""
        self._seen = _stamps(files)
        self._context = build()
        self.ends = dict(self._ends())

    @property
    def context(self) -> ssl.SSLContext:
        """The context for the next handshake."""
        return self._context

    def for_listener(self) -> ssl.SSLContext:
        """Return a context for a server that keeps the one it is given: each handshake goes on with the present one."""
        first = self._build()
        # Asked also where the client names no server. No tickets: a session that is resumed is not verified again.
        first.sni_callback = self._choose
        first.num_tickets = 0
        return first

    def _choose(self, handshake: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        handshake.context = self._context

    def refresh(self) -> None:
        """Take over what has changed on disk; what cannot be used is said once, and the former files stay in use."""
        seen = _stamps(self._files)
        if seen == self._seen:
            return
        try:
            context = self._build()
        except OSError as error:
            self._say(error)
            return
        self._context, self._seen, self._said = context, seen, ""
        self.ends = dict(self._ends())
        log.info("[%s]: %s is in use for new connections; open ones go on", self.name, self._files.certificate)

    def _say(self, error: OSError) -> None:
        text = words(error) if isinstance(error, ssl.SSLError) else error.strerror or str(error)
        if text != self._said:
            self._said = text
            log.warning(
                "[%s]: the changed files cannot be used, so the former certificate stays in use: %s; put a "
                "certificate, its key and its CA into %s",
                self.name, text, ", ".join(filter(None, self._files)),
            )  # fmt: skip

    def _ends(self) -> Iterator[tuple[str, float]]:
        if (end := end_of(self._files.certificate, self._files.key, is_server=self._is_server)) is not None:
            yield self.name, end
        if self._files.ca is not None and (end := earliest_end(self._context)) is not None:
            yield f"{self.name}-ca", end


async def follow(contexts: Collection[LiveContext]) -> None:
    """Follow the files until cancelled."""
    while True:
        await asyncio.sleep(FOLLOW_S)
        for each in contexts:
            each.refresh()


def ends(contexts: Iterable[LiveContext]) -> Iterator[tuple[tuple[str], float]]:
    """Yield when the certificates in use end, UTC seconds, with the label of the metric."""
    for each in contexts:
        for name, end in each.ends.items():
            yield (name,), end


def earliest_end(context: ssl.SSLContext) -> float | None:
    """Return when the first of the authorities that a context believes ends, UTC seconds; None: it believes none."""
    authorities: list[Any] = context.get_ca_certs()
    return min((float(ssl.cert_time_to_seconds(each["notAfter"])) for each in authorities), default=None)


def end_of(certificate: str, key: str, *, is_server: bool) -> float | None:
    """
    Return when a certificate ends, UTC seconds, also when that was in the past; None: no peer can verify it.

    Python tells of a certificate only what it has verified, so it is shown to ourselves, and believed because it is
    that one (X509_V_FLAG_PARTIAL_CHAIN).
    """
    try:
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        ours.check_hostname = False
        ours.verify_mode = ssl.CERT_NONE
        ours.load_cert_chain(certificate, key)
        peer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_server else ssl.PROTOCOL_TLS_SERVER)
        peer.check_hostname = False
        peer.verify_mode = ssl.CERT_REQUIRED
        peer.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME)
        peer.load_verify_locations(certificate)
        if not is_server:
            peer.load_cert_chain(certificate, key)
        shown = handshake(ours, peer) if is_server else handshake(peer, ours)
    except OSError:
        return None
    return float(ssl.cert_time_to_seconds(shown["notAfter"])) if shown else None


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """
    Let both speak with each other in memory; return the certificate that was verified, that of the client if any.

    :raise ssl.SSLError: When one refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    done = [False, False]
    for _ in range(_ROUNDS):
        for place, side in enumerate(sides):
            done[place] = done[place] or _step(side.do_handshake)
        if all(done):
            break
    verifying = sides[1 if server.verify_mode == ssl.CERT_REQUIRED else 0]
    return dict(verifying.getpeercert() or {})


def _step(work: Callable[[], None]) -> bool:
    try:
        work()
    except ssl.SSLWantReadError:
        return False
    return True


def words(error: ssl.SSLError) -> str:
    """Return OpenSSL's reason in words."""
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not that of the certificate"
    return (error.reason or str(error)).replace("_", " ").lower()


def _stamps(files: Files) -> tuple[tuple[int, int, int] | None, ...]:
    """Return what changes when a file is replaced or written; None: it is not there."""
    return tuple(_stamp(path) for path in files if path is not None)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
