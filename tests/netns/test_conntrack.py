"""Reading and deleting connections on the real kernel; the witness is the conntrack tool."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from natctl.model.port_use import NO_PORTS, PortUse
from natctl.netlink.conntrack import Conntrack, delete_connections, dump_ports, dump_ports_of
from tests.netns.private_namespace import private_namespace, run

pytestmark = pytest.mark.netns

VM = IPv4Address("100.64.0.5")
OTHER = IPv4Address("100.64.0.6")
MANAGED = 0x40000000
ALL = PortRange(1, 65535)


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with private_namespace():
        # Connection tracking is enabled per namespace by the first rule that needs it.
        run(
            "nft",
            "-f",
            "-",
            text="table ip t { chain c { type filter hook output priority 0\n ct state new counter\n }\n }",
        )
        yield


def insert(
    protocol: str, port: int, *, internal: IPv4Address = VM, server: str = "192.0.2.1", mark: int = MANAGED,
    more: tuple[str, ...] = (),
) -> None:  # fmt: skip
    # The tool does not pass the translated SCTP port to the kernel; the port then stays unchanged.
    sport = port if protocol == "sctp" else port ^ 0x1000
    run("conntrack", "-I", "-p", protocol, "--timeout", "600", "-s", "10.10.0.2", "-d", server, "--sport", str(sport),
        "--dport", "80", "--src-nat", f"{internal}:{port}", "--mark", str(mark), *more)  # fmt: skip


def insert_tcp(port: int, *, internal: IPv4Address = VM, server: str = "192.0.2.1", mark: int = MANAGED) -> None:
    insert("tcp", port, internal=internal, server=server, mark=mark, more=("--state", "ESTABLISHED"))


def insert_sctp(port: int, *more: str) -> None:
    insert("sctp", port, more=("--state", "ESTABLISHED", "--orig-vtag", "1", "--reply-vtag", "2", *more))


def witness() -> dict[tuple[IPv4Address, str], list[int]]:
    """Return the ports of managed, translated connections by internal address and protocol, as the tool prints them."""
    ports: dict[tuple[IPv4Address, str], list[int]] = defaultdict(list)
    for line in run("conntrack", "-L", "--mark", f"{MANAGED}/{MANAGED}", "--src-nat").splitlines():
        reply = line.split("src=")[2]
        address = re.search(r"dst=(\S+)", reply)
        port = re.search(r"(?:dport|id)=(\d+)", reply)
        assert address is not None
        assert port is not None
        ports[IPv4Address(address[1]), line.split()[0]].append(int(port[1]))
    return {key: sorted(each) for key, each in ports.items()}


def entries() -> int:
    return int(run("conntrack", "-C"))


@pytest.mark.per_kernel
def test_real_traffic_of_three_protocols_is_read_as_the_tool_prints_it() -> None:
    run("nft", "-f", "-", text=f"""
        table ip nat {{ chain c {{ type nat hook postrouting priority 100
            ct mark set {MANAGED}
            meta l4proto {{ tcp, udp }} snat to 127.0.0.9:20000-20063
            snat to 127.0.0.9
        }}
        }}""")  # fmt: skip
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        clients = [socket.create_connection(server.getsockname()) for _ in range(5)]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for port in (5000, 5001, 5002):
                udp.sendto(b"x", ("127.0.0.1", port))
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
            for identifier in (20001, 20002):
                icmp.sendto(struct.pack("!BBHHH", 8, 0, 0xF7FF - identifier, identifier, 0), ("127.0.0.1", 0))
        found = dump_ports().of(IPv4Address("127.0.0.9"))
        seen = witness()
        for client in clients:
            client.close()
    numbers = {"icmp": 1, "tcp": 6, "udp": 17}
    assert {name for _, name in seen} == set(numbers)
    for (_, name), ports in seen.items():
        assert list(found.protocols[numbers[name]].flows) == ports, name
    assert found.total == 5 + 3 + 2
    assert found.connections(PortRange(20000, 20063)) == 10
    assert found.in_use(PortRange(20000, 20063)) == 5
    assert found.in_use_by_protocol(PortRange(20001, 20002))["icmp"] == 2


def test_one_pass_serves_all_vms() -> None:
    for port in (20000, 20001, 20511):
        insert_tcp(port)
    insert_tcp(20000, server="192.0.2.2")
    insert("udp", 20000)
    insert_tcp(30000, internal=OTHER)
    found = dump_ports()
    assert set(found.vms) == {VM, OTHER}
    assert found.in_use(VM, PortRange(20000, 20511)) == 3
    assert found.in_use(VM, PortRange(20001, 20510)) == 1
    assert found.connections(VM, PortRange(20000, 20511)) == 5
    assert found.connections(OTHER, ALL) == 1


@pytest.mark.per_kernel
def test_only_managed_connections_are_read() -> None:
    insert_tcp(20000, mark=MANAGED | 0x00070003)
    insert_tcp(20001, mark=0x20000000)
    insert_tcp(20002, mark=0)
    assert entries() == 3
    assert list(dump_ports().of(VM).protocols[6].flows) == [20000]
    assert dump_ports(0x20000000).of(VM).connections(ALL) == 1


def test_a_guest_that_sends_from_its_internal_address_itself_is_counted() -> None:
    run("conntrack", "-I", "-p", "udp", "--timeout", "600", "-s", str(VM), "-d", "192.0.2.9", "--sport", "20003",
        "--dport", "53", "--mark", str(MANAGED))  # fmt: skip
    assert list(dump_ports().of(VM).protocols[17].flows) == [20003]


def test_an_empty_table_reads_as_nothing() -> None:
    assert dump_ports() == PortUse()
    assert dump_ports_of(VM) == NO_PORTS
    assert delete_connections(VM) == 0


@pytest.mark.per_kernel
def test_sctp_and_conntrack_zones_are_read_and_deleted() -> None:
    insert_sctp(20000)
    insert_sctp(20001, "--zone", "7")
    assert list(dump_ports().of(VM).protocols[132].flows) == [20000, 20001]
    assert delete_connections(VM) == 2
    assert entries() == 0


@pytest.mark.per_kernel
async def test_one_vm_is_read_exactly_whatever_the_mark() -> None:
    insert_tcp(20000)
    insert_tcp(20001, mark=0)
    insert("udp", 20001)
    insert_tcp(30000, internal=OTHER)
    conntrack = Conntrack()
    for at_cap in (False, True):
        count, took_s = await conntrack.count(VM, ALL, at_cap=at_cap)
        assert (count.filling.in_use, count.full) == (2, frozenset())
        assert took_s > 0
    assert (await conntrack.count(IPv4Address("100.64.0.7"), ALL, at_cap=True))[0].filling.in_use == 0


async def test_deleting_the_connections_of_a_vm_leaves_the_others_alone() -> None:
    for port in range(20000, 20150):
        insert_tcp(port)
    insert("udp", 20000)
    run("conntrack", "-I", "-p", "icmp", "--timeout", "600", "-s", "10.10.0.2", "-d", "192.0.2.1", "--icmp-type", "8",
        "--icmp-code", "0", "--icmp-id", "20001", "--src-nat", str(VM), "--mark", str(MANAGED))  # fmt: skip
    insert_tcp(30000, internal=OTHER)
    run(
        "conntrack",
        "-I",
        "-p",
        "udp",
        "--timeout",
        "600",
        "-s",
        str(VM),
        "-d",
        "192.0.2.9",
        "--sport",
        "20003",
        "--dport",
        "53",
    )
    assert await Conntrack().delete_connections(VM) == 150 + 1 + 1 + 1
    left = run("conntrack", "-L").splitlines()
    assert len(left) == 1
    assert f"dst={OTHER}" in left[0]


@pytest.mark.per_kernel
async def test_pruning_a_vm_leaves_its_connections_on_the_ports_that_it_holds() -> None:
    for port in (*range(20000, 20010), *range(20500, 20504)):
        insert_tcp(port)
    insert("udp", 20600)
    insert_tcp(30000, internal=OTHER)
    assert await Conntrack().delete_other_connections(VM, (PortRange(20000, 20007), PortRange(20500, 20503))) == 2 + 1
    assert witness() == {(VM, "tcp"): [*range(20000, 20008), *range(20500, 20504)], (OTHER, "tcp"): [30000]}
    assert await Conntrack().delete_other_connections(VM, (PortRange(20000, 20599),)) == 0


async def test_the_daemon_reads_the_namespace_it_runs_in_and_many_readings_go_on_at_once() -> None:
    for port in range(20000, 20050):
        insert_tcp(port)
    conntrack = Conntrack()
    readings = await asyncio.gather(*(conntrack.ports_of_all() for _ in range(12)))
    assert [use.of(VM).total for use, _ in readings] == [50] * 12


def test_ten_thousand_entries_agree_with_the_tool() -> None:
    script = "".join(
        f"-I -p udp --timeout 600 -s 10.10.{vm}.2 -d 192.0.2.{1 + at % 200} --sport {1024 + at} --dport 53 "
        f"--src-nat 100.64.1.{vm}:{20000 + at} --mark {MANAGED}\n"
        for vm in range(10)
        for at in range(1000)
    )
    run("conntrack", "-R", "/dev/stdin", text=script)
    assert entries() == 10_000
    seen = witness()
    found = dump_ports()
    assert {(address, "udp"): list(use.protocols[17].flows) for address, use in found.vms.items()} == seen
