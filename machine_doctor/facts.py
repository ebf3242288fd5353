"""
What is known of a machine, as frozen values; :mod:`machine_doctor.readers` fills them in, checks judge them.

A fact that could not be read is :class:`Unread`; :func:`known` turns it into the result ``could not tell``. Tested
in ``tests/unit/machine_doctor/test_examination.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import NamedTuple, TypeVar

import cpm.settings
import natctl.settings
from cpm.api.views import AddressView, NodeView, StatusView
from cpm.protocol.model import Role
from cpm.protocol.overlaps import Use
from machine_doctor.findings import CannotTell
from natctl.model.entries import Settings
from natctl.model.own_ports import LocalSocket
from natctl.ruleset.routing import Routing
from natctl.ruleset.way_check import Answer

_T = TypeVar("_T")


class Unread(NamedTuple):
    """In place of a fact: why it could not be read."""

    why: str


def known(fact: _T | Unread) -> _T:
    """
    Return a fact.

    :raise CannotTell: When it could not be read.
    """
    if isinstance(fact, Unread):
        raise CannotTell(fact.why)
    return fact


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What this machine is, or would be: from the configuration, or as `virt-ports install` would choose."""

    name: str
    roles: frozenset[Role]
    is_manager: bool
    is_installed: bool
    """False: nothing is configured, and the roles are those of the commonest machine."""
    kernel: Settings
    """As natd has them, only for the roles."""
    bridges: frozenset[str] = frozenset()
    """To which managed VMs are limited; empty: any."""
    natd: natctl.settings.Settings | None = None
    cpmd: cpm.settings.Settings | None = None
    wrong: tuple[str, ...] = ()
    """Configuration files that natd or cpmd would refuse, a sentence each."""
    unread: tuple[str, ...] = ()
    """Configuration files that this user may not read; roles are assumed without natd.toml."""

    @property
    def is_host(self) -> bool:
        """Whether VMs run here."""
        return Role.HOST in self.roles

    @property
    def is_edge(self) -> bool:
        """Whether this machine talks to the internet."""
        return Role.EDGE in self.roles


@dataclasses.dataclass(frozen=True, slots=True)
class KernelFacts:
    """The kernel and its modules."""

    release: str
    options: Mapping[str, str] | Unread
    """``CONFIG_…`` (without that prefix): ``y`` or ``m``."""
    modules: frozenset[str] | Unread
    """Names of the modules on disk, for this release."""
    loaded: frozenset[str] = frozenset()


class Interface(NamedTuple):
    """A network interface."""

    number: int
    """Its index."""
    name: str
    kind: str
    """``bridge``, ``tun``, ``vlan`` …; nothing for a real one."""
    master: str | None
    mtu: int | None
    addresses: tuple[IPv4Interface, ...] = ()


class PolicyRule(NamedTuple):
    """A routing rule, whosever it is."""

    priority: int
    mark: int
    mask: int
    table: int
    is_ours: bool
    is_inverted: bool
    is_selective: bool
    """It has another selector, for example an address or an interface."""


class ForwardChain(NamedTuple):
    """A chain of others at the forward hook that drops what it does not accept."""

    family: str
    table: str
    chain: str
    by: str
    """``policy drop``, or the statement at its end: ``drop`` or ``reject``."""
    named: frozenset[str]
    """Interfaces that rules of its table name; with ``*`` at the end, all that begin so."""
    has_sets: bool = False
    """Rules of its table look interfaces up in a set, whose members are not known."""


class ClosingRule(NamedTuple):
    """A rule of others at the forward hook, or behind it, that rejects or drops what is to leave by an interface."""

    family: str
    table: str
    chain: str
    interface: str


@dataclasses.dataclass(frozen=True, slots=True)
class FilterFacts:
    """Filters of other software."""

    chains: tuple[ForwardChain, ...]
    has_docker: bool
    """Whether there is Docker's chain for the operator's rules."""
    legacy: bool | Unread
    """Whether iptables-legacy has a table ``filter``."""
    begun: int | None
    """Connections that VMs of this host have begun, of those since natd made its table; None: there is no table."""
    closing: tuple[ClosingRule, ...] = ()
    """What no rule before such a one has accepted does not get to VMs on that bridge."""
    forwards: int = 0
    """Ports at which something is let in to VMs of this host."""


class BridgeWay(NamedTuple):
    """How the kernel would route a VM's packet, and the answer to it."""

    bridge: str
    number: int
    """Its index."""
    guest: IPv4Address
    """An address that a VM could have."""
    out: Answer
    back: Answer | None
    """None: not asked, since nothing goes out."""


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkFacts:
    """Interfaces, routes and rules."""

    interfaces: Mapping[str, Interface]
    to_internet: Answer
    """The way of a packet of this machine itself to the internet."""
    ways: tuple[BridgeWay, ...]
    rules: tuple[PolicyRule, ...]
    routing: Routing
    """Our routes and our rule."""
    foreign_in_table: int
    """Routes of others in our routing table."""
    uses: frozenset[Use]
    """Networks and addresses that the machine uses, for itself."""

    @property
    def addresses(self) -> dict[IPv4Address, str]:
        """The machine's addresses, and the interface of each."""
        return {one.ip: each.name for each in self.interfaces.values() for one in each.addresses}

    def name_of(self, number: int) -> str:
        """Return the name of an interface."""
        return next((each.name for each in self.interfaces.values() if each.number == number), "an unknown interface")


class Listener(NamedTuple):
    """A program that listens to an NFQUEUE or an NFLOG group."""

    number: int
    program: str
    """Its name; empty: not known."""
    is_natd: bool
    """Whether it is natd; False also when not known."""


class FileFacts(NamedTuple):
    """A file or folder; times in UTC seconds."""

    path: str
    mode: int
    uid: int
    owner: str
    changed: float
    """When it got its content or its name (the later of mtime and ctime)."""
    is_noexec: bool = False
    """Its file system is mounted noexec."""
    label: str | None = None
    """Its SELinux context."""


class SysctlLine(NamedTuple):
    """An assignment in sysctl.d that is in force at the next boot."""

    file: str
    key: str
    value: str


class Process(NamedTuple):
    """A daemon that runs, in this network namespace; times in UTC seconds."""

    name: str
    pid: int
    """0: not known, since it is in another PID namespace; its socket shows that it runs."""
    started: float | None
    label: str = ""
    """AppArmor's profile and mode, for example ``libvirtd (enforce)``; empty: unconfined, or not known."""


@dataclasses.dataclass(frozen=True, slots=True)
class HookFacts:
    """The libvirt hook."""

    file: FileFacts | None
    """None: there is none."""
    is_ours: bool | None
    """Whether its text is that of this version; None: it cannot be read."""
    others: tuple[FileFacts, ...]
    """Other files that libvirt executes, too, and writable folders on the way, each with its own."""
    folders: tuple[FileFacts, ...]
    fails: str | Unread
    """Why it does not run, with a remedy; empty: it runs."""
    apparmor_profiles: Mapping[str, str] | Unread = dataclasses.field(default_factory=dict)
    """Text of the profiles of libvirt's daemons, by path."""
    selinux_enforces: bool | Unread = False
    reloaded: float | None = None
    """When systemd last reloaded libvirt's daemon; None: not known."""


class UnitFacts(NamedTuple):
    """A systemd unit."""

    name: str
    exists: bool
    is_enabled: bool
    runs: bool


class DiskFacts(NamedTuple):
    """The file system of a folder."""

    path: str
    free_bytes: int
    total_bytes: int
    free_files: int
    total_files: int


class ClockFacts(NamedTuple):
    """The kernel's clock."""

    is_synchronised: bool
    maximum_error_s: float


class CertificateFacts(NamedTuple):
    """A certificate with its key and CA, checked as its peer would."""

    file: str
    kind: str
    """``node`` or ``manager``."""
    names: tuple[str, ...]
    ends: float | None
    """UTC seconds; None: it could not be read."""
    wrong: str
    """Why the peer would refuse it; empty: it would not."""
    ca_ends: float | None = None


class RemoteManager(NamedTuple):
    """cpmd on another machine, as far as a handshake tells."""

    url: str
    wrong: str
    """Why no connection comes about; empty: one does."""
    offset_s: float | None = None
    """By how much its clock is ahead of ours, to about a second; None: not known."""


@dataclasses.dataclass(frozen=True, slots=True)
class ManagerFacts:
    """What cpmd on this machine says."""

    status: StatusView
    nodes: tuple[NodeView, ...]
    pool: tuple[AddressView, ...]


class NetworkDaemon(NamedTuple):
    """A program that configures the network."""

    runs: bool
    keeps_rules: bool
    """It leaves the routing rules of others alone."""
    keeps_routes: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """Everything that checks judge."""

    now: float
    """UTC seconds."""
    is_root: bool
    version: str
    installed_at: float | None
    """When this version was installed, UTC seconds."""
    setup: Setup
    kernel: KernelFacts
    sysctl: Mapping[str, str]
    """Values under /proc/sys by key, for example ``net.ipv4.ip_forward``; those that do not exist are missing."""
    sysctl_files: tuple[SysctlLine, ...]
    network: NetworkFacts | Unread
    filters: FilterFacts | Unread
    families: frozenset[str] | Unread
    """Families in which there is a table of ours."""
    queues: tuple[Listener, ...] | Unread
    log_groups: tuple[Listener, ...] | Unread
    connections: int | None
    """In the connection table."""
    hash_buckets: int | None
    """Of the connection table."""
    sockets: frozenset[LocalSocket] | Unread
    processes: tuple[Process, ...]
    """natd, cpmd and libvirt's daemons."""
    hook: HookFacts | Unread
    units: tuple[UnitFacts, ...] | Unread
    files: tuple[FileFacts, ...]
    """Sockets, keys, ledger and their folders, those that exist and can be looked at."""
    unseen: tuple[str, ...]
    """Of these, those that could not be looked at."""
    disks: tuple[DiskFacts, ...]
    clock: ClockFacts | Unread
    certificates: tuple[CertificateFacts, ...] | Unread
    remote: RemoteManager | Unread | None
    """None: natd's manager is on this machine, or there is no natd."""
    manager: ManagerFacts | Unread
    external: frozenset[IPv4Address] | Unread
    """Addresses of the pool: all that cpmd names, else those in our tables."""
    networkd: NetworkDaemon

    def process(self, *names: str) -> Process | None:
        """Return the first process with one of these names."""
        return next((each for each in self.processes if each.name in names), None)

    @property
    def internal_pool(self) -> IPv4Network | None:
        """The pool of internal addresses, as far as this machine knows it."""
        if not isinstance(self.network, Unread) and self.network.routing.pool is not None:
            return self.network.routing.pool
        return self.setup.cpmd.pool.internal if self.setup.cpmd is not None else None
