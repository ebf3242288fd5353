"""
Paths from a light guest to the internet, which differ only in how host and edge treat packets.

Every lane is the wiring of a lab (:mod:`lab.net`): guest, bridge, host, underlay, edge, uplink, router, internet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

from bench.fleet import FIRST_EXTERNAL, FIRST_TAP
from bench.site import EDGE, HOST, NAME, site, start_all
from bench.worker import Worker
from lab import net, toml
from lab.daemons import CPMD, DaemonSettings, natd_of
from lab.process import Process
from lab.shell import inside, ip_batch, run
from lab.sites import CLUSTER

_GUEST = "guest"
FORWARDED: Final = 40_000
"""The port of forwards, outside and in the guest: far from the guest's range."""
_CATCHING_UP_S = 1.5
# A range for thousands of connections that all go to one address and port; nothing shrinks it.
_CPMD: Final[toml.Document] = {"pool": {"initial": 32768}, "scaling.guards": {"shrink_after_samples": 1_000_000}}
_OFF: Final = {"fast_path": "off"}


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
    """One way to the internet, by its namespaces."""

    guest: str
    host: str
    internet: str
    daemons: tuple[Process, ...] = ()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the daemons while another lane is measured, so that they take none of its processor time."""
        if not self.daemons:
            yield
            return
        for daemon in self.daemons:
            daemon.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for daemon in self.daemons:
                daemon.signal(signal.SIGCONT)
            # They first catch up on missed work, which must not be measured as this lane's either.
            time.sleep(_CATCHING_UP_S)


@contextlib.contextmanager
def product_lane(*, fast_path: bool = True) -> Iterator[Lane]:
    """
    Yield a lane with cpmd and natds running, whose guest was started through the hook.

    :param fast_path: Whether programs do packets on host and edge where they can; False: nftables does all.
    """
    tables: dict[str, toml.Document] = {} if fast_path else {"hosts": {"host": _OFF}, "edges": {"edge": _OFF}}
    with site(DaemonSettings(cpmd=_CPMD, natd={}, **tables), NAME if fast_path else f"{NAME}nft") as lab:
        # As in the lane that it is compared with: where packets go of which nothing else is said.
        ip_batch([f"route replace default via {_underlay(EDGE)}"], lab.namespace(HOST))
        start_all(lab)
        guest = lab.add_guest(_GUEST, HOST)
        daemons = tuple(lab.daemons.process(name) for name in (CPMD, natd_of(HOST), natd_of(EDGE)))
        yield Lane(guest.namespace, lab.namespace(HOST), lab.namespace("internet"), daemons)


@contextlib.contextmanager
def forward_lane() -> Iterator[tuple[Lane, IPv4Address]]:
    """Yield a lane as :func:`product_lane` does, whose guest has a forward of :data:`FORWARDED`, and its address."""
    with site(DaemonSettings(cpmd=_CPMD, natd={}), f"{NAME}fwd") as lab:
        start_all(lab)
        guest = lab.add_guest(_GUEST, HOST)
        words = (
            "forward",
            "add",
            _GUEST,
            str(FORWARDED),
            "--port",
            str(FORWARDED),
            "--to",
            guest.address,
            "-o",
            "json",
        )
        address = IPv4Address(json.loads(lab.operate(*words))["external_address"])
        while json.loads(lab.operate("forward", "list", "-o", "json"))[0]["state"] != "active":
            time.sleep(0.1)
        daemons = tuple(lab.daemons.process(name) for name in (CPMD, natd_of(HOST), natd_of(EDGE)))
        yield Lane(guest.namespace, lab.namespace(HOST), lab.namespace("internet"), daemons), address


@contextlib.contextmanager
def destination_nat_lane() -> Iterator[tuple[Lane, IPv4Address]]:
    """Yield a lane without virt-ports: the host has one destination NAT, and the edge only routes; and its address."""
    with _wiring("benchdnat") as lane:
        router, edge = net.namespace("benchdnat", "router"), net.namespace("benchdnat", EDGE)
        uplink = CLUSTER.machine(EDGE).address("uplink")
        ip_batch([f"route add default via {_underlay(EDGE)}"], lane.host)
        ip_batch([f"route replace {FIRST_EXTERNAL}/32 via {uplink}"], router)
        ip_batch([f"route add {FIRST_EXTERNAL}/32 via {_underlay(HOST)}"], edge)
        rules = (
            "table ip plain { chain nat { type nat hook prerouting priority dstnat; "
            f"ip daddr {FIRST_EXTERNAL} tcp dport {FORWARDED} dnat to 10.10.0.10; }}; }}"
        )
        run(*inside(lane.host), "nft", rules)
        yield lane, FIRST_EXTERNAL


@contextlib.contextmanager
def masquerade_lane() -> Iterator[Lane]:
    """Yield a lane without virt-ports: the host masquerades and the edge only routes."""
    with _wiring("benchplain") as lane:
        router, host = net.namespace("benchplain", "router"), lane.host
        ip_batch([f"route add default via {_underlay(EDGE)}"], host)
        ip_batch([f"route add 172.30.0.0/24 via {CLUSTER.machine(EDGE).address('uplink')}"], router)
        rules = (
            "table ip plain { chain nat { type nat hook postrouting priority srcnat; oifname underlay masquerade; }; }"
        )
        run(*inside(host), "nft", rules)
        yield lane


@contextlib.contextmanager
def fleet_lane(vms: int, *, full_cone: bool = False) -> Iterator[Lane]:
    """
    Yield a lane whose host and edge hold this many VMs, the guest among them; no daemon runs.

    :param full_cone: Whether the VMs have endpoint-independent filtering.
    """
    name = f"benchcone{vms}" if full_cone else f"bench{vms}"
    with _wiring(name) as lane:
        uplink = CLUSTER.machine(EDGE).address("uplink")
        ip_batch([f"route replace {FIRST_EXTERNAL}/32 via {uplink}"], net.namespace(name, "router"))
        for role, machine in (("edge", EDGE), ("host", HOST)):
            with Worker(inside(net.namespace(name, machine))) as worker:
                worker.call("load", role, vms, full_cone)
        yield lane


@contextlib.contextmanager
def _wiring(name: str) -> Iterator[Lane]:
    host, guest = net.namespace(name, HOST), net.namespace(name, _GUEST)
    everything = [guest, *(net.namespace(name, node) for node in CLUSTER.namespaces)]
    net.delete_with_processes(everything)
    try:
        net.create(name, CLUSTER)
        ip_batch(["link add vmbr0 type bridge", "addr add 10.10.0.1/24 dev vmbr0", "link set vmbr0 up"], host)
        ip_batch([f"netns add {guest}"])
        ip_batch(
            [
                f"link add tap0 index {FIRST_TAP} type veth peer name eth0 netns {guest}",
                "link set tap0 master vmbr0 up",
            ],
            host,
        )
        ip_batch(
            [
                *("link set lo up", "addr add 10.10.0.10/24 dev eth0", "link set eth0 up"),
                "route add default via 10.10.0.1",
            ],
            guest,
        )
        yield Lane(guest, host, net.namespace(name, "internet"))
    finally:
        net.delete_with_processes(everything)


def _underlay(machine: str) -> str:
    return str(CLUSTER.machine(machine).address("underlay"))
