"""natd's settings: ``natd.toml``, one struct per table, every field with its unit and reason."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from cpm.protocol.bounds import MAX_PERIOD_S, MAX_WORD
from cpm.protocol.errors import ConfigError
from cpm.protocol.model import Role
from cpm.protocol.timeouts import TimeoutsTable
from cpm.service import config, logs
from cpm.service.metrics.settings import MetricsListen
from natctl.model import entries
from qga_agent import announcement

DEFAULT_PATH = Path("/etc/virt-ports/natd.toml")

_Period = Annotated[float, Meta(gt=0, le=MAX_PERIOD_S)]
_NotNegative = Annotated[float, Meta(ge=0)]


class ManagerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The way to cpmd."""

    url: str = "unix:///run/virt-ports/cpmd.sock"
    """``unix:///path`` on the same machine, ``https://address:port`` on another one."""
    certificate: str | None = None
    """PEM file: this node's certificate; its subject alternative name is this node's name."""
    key: str | None = None
    """PEM file: its private key."""
    ca: str | None = None
    """PEM file: the CA that signed the manager's certificate."""


class ListenSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the libvirt hook reaches natd."""

    socket: str = "/run/virt-ports-natd/natd.sock"
    """In a directory that only root can write to, since libvirt's hook waits for what is said there."""


class HostTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The host role: this machine runs VMs."""

    uplinks: frozenset[str]
    """Interfaces towards the edges, or towards the internet if this machine is its own edge."""
    bridges: frozenset[str] = frozenset()
    """Only VMs with an interface on one of these bridges are managed; empty: on any bridge."""
    mark_mask: int = 0x7FFF0000
    """Contiguous bits of the packet mark that virt-ports uses, by default 0x7fff0000; natd leaves all others alone."""
    exempt: tuple[IPv4Network, ...] = entries.DEFAULT_EXEMPT
    """Destinations that are neither translated nor sent to the edges (RFC 6888 REQ-6)."""
    route_table: int = 7414
    """Number of the routing table with the ways of VMs' packets; nothing else may use it."""
    rule_priority: int = 7414
    """Priority of the routing rule that leads there."""
    log_group: Annotated[int, Meta(ge=0, le=65533)] = 7414
    """NFLOG group in which the kernel signals that an arrival budget is used up. In the next one it reports packets of
    connections from before their VM was managed, and in the one after that guests' requests for ports (PCP, NAT-PMP).
    No other program may use any of them."""
    queue: Annotated[int, Meta(ge=0, le=65535)] = 7414
    """NFQUEUE of deferred connections, which wait until their VM has more ports; no other program may use it."""
    timeouts: TimeoutsTable = TimeoutsTable()
    """Timeouts of VMs' connections on this host; values that are not set are the manager's."""
    fast_path: entries.FastPathUse = entries.FastPathUse.AUTO
    """Whether programs in the kernel (eBPF) are used at VMs' taps and at ``uplinks``. They drop what VMs send while
    nftables has no rules, because somebody flushed them, and give what was translated an edge as next hop, so that no
    routing rule is needed. ``auto``: where nothing speaks against it; `virt-ports node show` says where the rule is
    needed, and why. ``off``: nftables and the rule do all; without rules packets may leave untranslated."""
    libvirt: str | None = "qemu:///system"
    """URI of the libvirt to watch; empty: VMs are known from hooks and taps only."""


class EdgeTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The edge role: this machine talks to the internet."""

    uplinks: frozenset[str]
    """Interfaces to the internet."""
    underlay: frozenset[str] = frozenset()
    """Interfaces to the hosts; empty if this machine is the only host."""
    keep_apart: bool = True
    """Whether natd translates the connections of this machine's other guests, from private addresses to public ones,
    where the uplink's address is in the pool: they leave by the machine's own ports, and never by a VM's. Set it to
    false if other software translates them to another address, or if they must not be translated."""
    check_senders: entries.SenderCheck = entries.SenderCheck.MAC
    """How a packet with a VM's internal address shows that the VM's host sent it. ``mac``: by the hardware address that
    this machine's neighbour table has for the host. ``interface``: by the interface that leads to the host; for hosts
    that send with several hardware addresses (bonding modes balance-tlb and balance-alb, two cards in one network).
    ``off``: not at all; for hosts that send by another interface than the one that leads to them."""
    forward: entries.Forwarding = entries.Forwarding.ALL
    """What this machine forwards between ``underlay`` and ``uplinks``. ``all``: the packets of VMs, and anything else
    as its routes and other rules have it. ``vms``: only what it translated, and ICMP errors from the hosts. What goes
    between other interfaces, and what the machine itself sends and gets, is not concerned."""
    fast_path: entries.FastPathUse = entries.FastPathUse.AUTO
    """Whether most packets of VMs are done by a program in the kernel (eBPF) at ``uplinks`` and ``underlay``. ``auto``:
    where nothing speaks against it; `virt-ports node show` says where, and what does. ``off``: nftables does all."""


class MonitorTable(Struct, frozen=True, forbid_unknown_fields=True):
    """Measuring."""

    period_s: _Period = 1.0
    """Seconds between two readings of all VMs."""
    ensure_s: _Period = 5.0
    """Seconds between two comparisons of the kernel with what it should hold."""
    source: str = "auto"
    """Where interface counters come from. ``libvirt``: its bulk statistics; ``psutil``: the kernel's, faster with many
    VMs, and the only ones of guests that libvirt does not run; ``auto``: libvirt for up to 100 VMs, else the kernel."""
    guest_period_s: _NotNegative = 10.0
    """Seconds between two visits to a VM's guest agent; 0: no visits, and guests are told nothing."""
    arrivals: bool = True
    """Whether to receive the kernel's signals about used-up arrival budgets. Without them, growth is noticed only once
    per ``period_s``: for comparison, or if another program needs the NFLOG group."""


class GuestsTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The QEMU guest agents of the VMs: what they are told, and how they are reached."""

    announce_file: str = announcement.DEFAULT_PATH
    """Where a guest finds its external address and ports, in the guest; an empty string: nowhere."""
    announce_local_port_range: bool = False
    """Whether to set the guests' net.ipv4.ip_local_port_range to their ranges; ``local-port-range="yes"`` or ``"no"``
    in a VM's metadata takes precedence."""
    agent_sockets: str = ""
    """Path of the agents' unix sockets, with ``{uuid}`` in it, for VMs that libvirt does not run."""
    agent_timeout_s: Annotated[int, Meta(ge=0, le=60)] = 1
    """Seconds that libvirt waits for the reply to one command of natd; 0 is taken as 1. For a frozen agent it
    waits as long as is set for the domain (``virsh guest-agent-timeout``, 5 s by default); natd leaves that alone."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    underlay_address: IPv4Address
    """This machine's address between hosts and edges."""
    name: Annotated[str, Meta(max_length=MAX_WORD)] = ""
    """How the manager knows this node; empty: the host name."""
    roles: frozenset[Role] = frozenset({Role.HOST, Role.EDGE})
    """What this machine asks to be; the manager has to approve it."""
    manager: ManagerSettings = ManagerSettings()
    listen: ListenSettings = ListenSettings()
    host: HostTable | None = None
    edge: EdgeTable | None = None
    monitor: MonitorTable = MonitorTable()
    guests: GuestsTable = GuestsTable()
    metrics: MetricsListen = MetricsListen()
    state: str = "/var/lib/virt-ports-natd"
    """Folder in which natd keeps which manager it follows, so that it notices another one or an old ledger."""
    log_level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``."""

    @property
    def node_name(self) -> str:
        """The name, or the host name where none is set."""
        return self.name or socket.gethostname()

    def kernel(self) -> entries.Settings:
        """Return the settings of the kernel layer."""
        host, edge = self.host, self.edge
        return entries.Settings(
            host=entries.HostSettings(
                uplinks=host.uplinks,
                mark_mask=host.mark_mask,
                route_table=host.route_table,
                rule_priority=host.rule_priority,
                exempt=host.exempt,
                log_group=host.log_group,
                queue=host.queue,
                timeouts=host.timeouts,
                fast_path=host.fast_path,
            )
            if host is not None and Role.HOST in self.roles
            else None,
            edge=entries.EdgeSettings(
                edge.uplinks, edge.underlay, edge.keep_apart, edge.check_senders, edge.forward, edge.fast_path
            )
            if edge is not None and Role.EDGE in self.roles
            else None,
        )


def load(path: Path) -> Settings:
    """
    Read and check ``natd.toml``.

    :raise ConfigError: When the file cannot be read or something in it is wrong.
    """
    settings = config.load(path, Settings)
    file = str(path)
    if not settings.roles:
        raise ConfigError(file, "roles", 'name at least one: roles = ["host", "edge"]')
    for role, table in ((Role.HOST, settings.host), (Role.EDGE, settings.edge)):
        if role in settings.roles and table is None:
            raise ConfigError(file, role.value, f'is required for the role; add [{role.value}] with uplinks = ["…"]')
        if role in settings.roles and table is not None and not table.uplinks:
            raise ConfigError(file, f"{role.value}.uplinks", 'name at least one interface: uplinks = ["eth0"]')
    if settings.host is not None:
        _check_mask(file, settings.host.mark_mask)
        settings.host.timeouts.check(file, "host.timeouts")
    if settings.monitor.source not in ("auto", "libvirt", "psutil"):
        raise ConfigError(file, "monitor.source", "use auto, libvirt or psutil")
    if settings.guests.agent_sockets and "{uuid}" not in settings.guests.agent_sockets:
        raise ConfigError(file, "guests.agent_sockets", "use a path with {uuid} in it, one socket for each VM")
    settings.metrics.check(file)
    logs.check_level(file, settings.log_level)
    _check_manager(file, settings.manager)
    return settings


def _check_mask(file: str, mask: int) -> None:
    lowest = mask & -mask
    contiguous = mask > 0 and (mask // lowest) & (mask // lowest + 1) == 0
    if not contiguous or mask > 0xFFFFFFFF or mask.bit_count() < 4:
        raise ConfigError(file, "host.mark_mask", "use at least 4 contiguous bits of 32, for example 0x7fff0000")


def _check_manager(file: str, manager: ManagerSettings) -> None:
    if manager.url.startswith("unix:///"):
        return
    if not manager.url.startswith("https://"):
        raise ConfigError(file, "manager.url", "use unix:///path or https://address:port")
    for key in ("certificate", "key", "ca"):
        if getattr(manager, key) is None:
            raise ConfigError(file, f"manager.{key}", "is required with https; nodes are known by certificates")
