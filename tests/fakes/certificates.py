"""Certificates of a manager and its nodes, as an operator issues them."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

from cpm.api import server, session


class Certificates:
    """
    A CA and what it has issued.

    :param directory: Where the files are.
    """

    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        self._directory = directory
        self._ca = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(self._ca)

    def manager(self) -> ssl.SSLContext:
        """Return the context of a manager at 127.0.0.1."""
        return server.tls_context(*self._issue("127.0.0.1"))

    def node(self, name: str) -> ssl.SSLContext:
        """Return the context of a node with a certificate for this name."""
        return session.tls_context(*self._issue(name))

    def _issue(self, name: str) -> tuple[str, str, str]:
        issued = self._authority.issue_cert(name)
        chain, key = (self._directory / f"{name}.{kind}" for kind in ("crt", "key"))
        issued.cert_chain_pems[0].write_to_path(chain)
        issued.private_key_pem.write_to_path(key)
        return str(chain), str(key), str(self._ca)
