"""
Gives a machine's kernel back as it was before natd programmed it. Used by ``virt-ports uninstall`` only.

Tested in ``tests/netns/test_withdrawal.py``.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from ipaddress import IPv4Address
from pathlib import Path

from cpm.protocol.errors import ConfigError, KernelError
from natctl import settings
from natctl.kernel import legacy_tables, sysctl, unrouted_taps
from natctl.kernel.settings_before import FILE, Setting, SettingsBefore
from natctl.netlink import classifiers, links, routes
from natctl.netlink.classifiers import Side
from natctl.netlink.conntrack import counting, delete_connections, entries
from natctl.netlink.nftables import encode, foreign, read
from natctl.netlink.socket import NETFILTER, ROUTE, Socket
from natctl.ruleset import host_maps
from natctl.ruleset.marks import Marks
from natctl.ruleset.plan import DeleteTable
from natctl.ruleset.routing import Routing
from natctl.ruleset.values import TABLE, Family

_AT_FORWARD = frozenset({"filter", "nat", "mangle", "security"})
"""Tables of iptables-legacy with rules for forwarded packets."""


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """What the kernel holds of ours."""

    tables: tuple[Family, ...]
    routing: Routing
    settings: tuple[tuple[str, str, str], ...]
    """Those that natd changed: path below /proc/sys/net/ipv4, present value, value to set."""
    with_forwarding: tuple[tuple[str, str], ...]
    """Those that the kernel changes when ``ip_forward`` is set back, and what they are to be then."""
    kept: tuple[str, ...]
    """Those that stay, a sentence each."""
    taps: tuple[tuple[int, str], ...]
    """VMs' interfaces, by index and name, from which nothing is routed."""
    programs: tuple[tuple[int, str, Side], ...]
    """Of the fast path: at which interface, by index and name, and on which side."""
    connections: frozenset[IPv4Address]
    """Internal addresses of the VMs with connections that our rules translate."""

    def lines(self) -> Iterator[str]:
        """Yield what a withdrawal removes or sets back, a line each."""
        yield from (f"table {family} {TABLE}" for family in self.tables)
        found = self.routing
        if found.internals:
            yield f"routes to {len(found.internals)} VMs on other hosts"
        if found.pool is not None:
            yield f"route {found.pool} (unreachable)"
        if found.rule is not None:
            yield f"rule fwmark {found.rule.mark:#x} lookup {found.rule.table}"
        if found.way is not None or found.barrier is not None:
            yield f"default routes of table {found.way[0] if found.way else found.barrier}"
        yield from (f"program at {side.name.lower()} of {name}" for _, name, side in self.programs)
        yield from (f"{sysctl.key(f'conf/{name}/forwarding')} from 0 to 1" for _, name in self.taps)
        yield from (f"{sysctl.key(path)} from {now} to {to}" for path, now, to in self.settings)


def config(path: Path = settings.DEFAULT_PATH) -> settings.Settings | None:
    """Return natd's settings; None: there are none that can be read."""
    try:
        return settings.load(path)
    except ConfigError:
        return None


def is_running(found: settings.Settings | None) -> bool:
    """Say whether a natd listens for the hook: it would put back what is removed."""
    return is_listening((found.listen if found else settings.ListenSettings()).socket)


def is_listening(path: str) -> bool:
    """Say whether a process listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(path)
        except (TimeoutError, BlockingIOError):
            return True  # it is busy
        except OSError:
            return False
        return True


def look(found: settings.Settings | None) -> Held:
    """
    Return what the kernel holds, in the network namespace of the calling thread.

    :param found: natd's settings; None: the defaults count.
    :raise KernelError: When it cannot be read.
    """
    mask = found.host.mark_mask if found and found.host else settings.HostTable(frozenset()).mark_mask
    run = Path((found.listen if found else settings.ListenSettings()).socket).parent
    with closing(Socket(NETFILTER, "reach nftables")) as nft, closing(Socket(ROUTE, "reach the routing tables")) as rt:
        holdings = read.read_tables(nft, lambda: None).holdings
        tables = holdings.tables
        legacy = (f"iptables-legacy {name}" for name in sorted(_AT_FORWARD & legacy_tables.names()))
        forwarding = (*foreign.forwarding_tables(nft), *legacy)
        routing = routes.read(rt)
        every = links.read_links(rt)
        programs = tuple(_programs(rt, every.values()))
        taps = tuple(
            (link.number, link.name)
            for tap in host_maps.taps_in(holdings)
            if (link := every.get(tap)) is not None and not link.forwards
        )
    noted = SettingsBefore(run / FILE).read()
    changed = {path: each for path, each in noted.items() if sysctl.read(path) == each.ours}
    following = {path: noted[path].before for path in changed if sysctl.follows_forwarding(path)}
    changed = {path: each for path, each in changed.items() if path not in following}
    kept: tuple[str, ...] = ()
    if sysctl.FORWARDING in changed and forwarding:
        del changed[sysctl.FORWARDING]
        kept = (f"net.ipv4.ip_forward stays 1: other rules forward packets ({', '.join(forwarding)})",)
    return Held(
        tuple(sorted(tables, key=lambda family: family.name)),
        routing,
        tuple((path, each.ours, each.before) for path, each in sorted(changed.items()) if each.ours != each.before),
        _with_forwarding(noted, following) if sysctl.FORWARDING in changed else (),
        kept,
        taps,
        programs,
        _with_connections(Marks.of_mask(mask).flag) if tables else frozenset(),
    )


def withdraw(held: Held) -> None:
    """
    Remove and set back all of it: first what translates packets, then the connections that it translated.

    These would stay in the kernel for hours, and count as those of whichever VM has the internal address after another
    installation.

    :raise KernelError: When the kernel refuses; what was done before stays done, and another call goes on.
    """
    with closing(Socket(NETFILTER, "reach nftables")) as nft, closing(Socket(ROUTE, "reach the routing tables")) as rt:
        # Before the rules: what is marked at a tap and has met none would be dropped.
        for index, _, side in held.programs:
            classifiers.detach(rt, index, side)
        for index in {index for index, _, _ in held.programs}:
            classifiers.remove_empty_qdisc(rt, index)
        if held.tables:
            nft.execute(encode.transaction(DeleteTable(family) for family in held.tables), "remove our tables")
        routes.drop(rt, held.routing)
        unrouted_taps.release(rt, (index for index, _ in held.taps))
    for internal in sorted(held.connections):
        delete_connections(internal)
    for path, _, value in held.settings:
        sysctl.write(path, value)
    for path, value in held.with_forwarding:
        if sysctl.read(path) not in (None, value):
            sysctl.write(path, value)


def _with_forwarding(noted: Mapping[str, Setting], unchanged: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """
    Return what settings are to be after ``ip_forward`` was set back.

    :param unchanged: What those were before that are still as the kernel set them; the others were changed by others.
    """
    paths = [path for path in sorted(noted) if sysctl.follows_forwarding(path)]
    values = [(path, unchanged[path] if path in unchanged else sysctl.read(path)) for path in paths]
    return tuple((path, value) for path, value in values if value is not None)


def _programs(rt: Socket, every: Iterable[links.Link]) -> Iterator[tuple[int, str, Side]]:
    for link in every:
        for side in Side:
            if any(each.is_ours for each in classifiers.filters(rt, link.number, side)):
                yield link.number, link.name, side


def _with_connections(flag: int) -> frozenset[IPv4Address]:
    try:
        with closing(entries.open_socket("list connections")) as ct:
            return frozenset(counting.zones_of_all(ct, flag))
    except KernelError:
        # Without conntrack there are none.
        return frozenset()
