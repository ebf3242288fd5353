"""Resolvers and DHCP servers, from the files of the programs that ask them."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

from cpm.protocol.overlaps import Use
from cpm.service.network_services import network_services

FILES = {
    "etc/resolv.conf": "# nameserver 9.9.9.9\nsearch example\nnameserver 127.0.0.53\nnameserver fe80::1\n",
    "run/systemd/resolve/resolv.conf": "nameserver 100.100.2.136\nnameserver 300.1.1.1\n",
    "run/systemd/netif/leases/2": "ADDRESS=100.72.0.10\nSERVER_ADDRESS=100.80.0.67\n",
    "var/lib/dhcp/dhclient.eth0.leases": "lease {\n  option dhcp-server-identifier 100.80.0.68;\n}\n",
    "var/lib/NetworkManager/internal-1.lease": "SERVER_ADDRESS=100.80.0.69\n",
}


def test_all_that_files_name(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    resolvers = {Use.of(IPv4Address(text), "resolver") for text in ("127.0.0.53", "100.100.2.136")}
    servers = {Use.of(IPv4Address(f"100.80.0.{last}"), "DHCP server") for last in (67, 68, 69)}
    assert network_services(tmp_path) == resolvers | servers


def test_a_machine_without_any(tmp_path: Path) -> None:
    assert network_services(tmp_path) == frozenset()
    (tmp_path / "etc/resolv.conf").mkdir(parents=True)
    assert network_services(tmp_path) == frozenset()
