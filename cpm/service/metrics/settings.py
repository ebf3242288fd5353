"""
An address at which a daemon may only be read: the table ``[metrics]`` of both daemons' settings, ``[page]`` of cpmd's.

Tested in ``tests/unit/cpm/api/test_scraping.py``.
"""

from __future__ import annotations

from msgspec import Struct

from cpm.protocol.bounds import LAST_PORT, whole_number
from cpm.protocol.errors import ConfigError


class Listen(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a daemon serves what may be read. Names of VMs are in it: anyone who reaches the address may read them."""

    address: str | None = None
    """``IP:PORT`` to listen on, for reading only: usually port 9417 for metrics of cpmd, 9418 for those of natd, 7480
    for the page. If not set, nowhere."""
    certificate: str | None = None
    """PEM file: with it and ``key`` the address speaks HTTPS."""
    key: str | None = None
    """PEM file: its private key."""
    client_ca: str | None = None
    """PEM file: only clients with a certificate of this CA may read. If not set, everybody. As ``client_ca_file`` and
    ``client_auth_type: RequireAndVerifyClientCert`` of Prometheus' own exporters."""

    def check(self, file: str, table: str = "metrics") -> None:
        """
        Check what the types do not say.

        :param file: The settings file, for the error.
        :param table: The table in it, likewise.
        :raise ConfigError: When something is wrong.
        """
        if self.address is not None:
            split_address(file, f"{table}.address", self.address)
        if (self.certificate is None) != (self.key is None):
            raise ConfigError(file, f"{table}.key", "certificate and key belong together; set both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ConfigError(file, f"{table}.client_ca", "needs certificate and key: without TLS nobody shows one")


class MetricsListen(Listen, frozen=True, forbid_unknown_fields=True):
    """Where a daemon serves its metrics."""

    token_file: str | None = None
    """A file with a token that a reader has to show (``Authorization: Bearer``), as Prometheus' ``authorization`` with
    ``credentials_file`` does; read for each scrape, so that it can be renewed. If not set, no token is asked for."""

    def check(self, file: str, table: str = "metrics") -> None:
        """:raise ConfigError: As that of :class:`Listen`, and when the path of the token is none."""
        super().check(file, table)
        if self.token_file is not None and not self.token_file.startswith("/"):
            raise ConfigError(file, f"{table}.token_file", "use a path that begins with /")


def split_address(file: str, key: str, address: str) -> tuple[str, int]:
    """
    Split ``IP:PORT``; an IPv6 address is in brackets.

    :raise ConfigError: When it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    number = whole_number(port, LAST_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not (host and colon and number is not None):
        raise ConfigError(file, key, "use IP:PORT, for example 127.0.0.1:9417")
    return host, number
