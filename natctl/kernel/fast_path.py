"""
The edge's fast path: a program at its interfaces that does most packets without nftables.

The program does all of a packet or nothing, so it may come and go at any time: what it does not do is done by the
rules of nftables, which are always there (``docs/design/0033-fast-path.md``). What it reads are tables in memory, which
follow each change before nftables does. Tables and program are made anew when a VM does not fit or an interface
changed; the program is then exchanged in place.

Nothing is read back: a natd that starts makes new tables of what it programs.

Tested by ``tests/netns/test_fast_path.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Final, NamedTuple

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.messages import FastPathAt
from cpm.protocol.model import DomainUUID
from natctl.bpf.loading import Loaded, NoObject, lookup_flags
from natctl.kernel import passed_by
from natctl.kernel.attached import Attached
from natctl.kernel.senders import Known
from natctl.model.entries import EdgeSettings, FastPathUse, SenderCheck
from natctl.netlink.classifiers import Side
from natctl.netlink.links import Link, read_links
from natctl.netlink.socket import Socket
from natctl.ruleset import owner_tables
from natctl.ruleset.owner_tables import MOST_HOSTS, MOST_INTERFACES, Tables

PROGRAM: Final = "edge"


class Found(NamedTuple):
    """Where the program can be in force."""

    links: Mapping[str, Link]
    """The interfaces of the edge that exist, by name."""
    reasons: Mapping[str, str]
    """Why not, by name of the interface; an empty string: it can."""


class FastPath:
    """
    The program and its tables; nothing before the first :meth:`ensure`.

    One thread at a time uses it, as :class:`~natctl.kernel.programmed.Programmed`.

    :param settings: The edge role; None: this machine does not have it.
    """

    def __init__(self, settings: EdgeSettings | None) -> None:
        self._settings = settings
        self._running: _Running | None = None
        self._attached = Attached(Side.INGRESS, PROGRAM)
        self.states: tuple[FastPathAt, ...] = ()
        """Where it is in force, and why not elsewhere."""

    def look(self, rtnl: Socket, nft: Socket) -> Found:
        """Find out where it can be in force. Changes nothing, and never fails."""
        if self._settings is None:
            return Found({}, {})
        names = [*sorted(self._settings.uplinks), *sorted(self._settings.underlay - self._settings.uplinks)]
        try:
            links = {link.name: link for link in read_links(rtnl).values() if link.name in names}
            return Found(links, _reasons(self._settings, names, links, rtnl, nft))
        except KernelError as error:
            return Found({}, dict.fromkeys(names, str(error)))

    def ensure(
        self, rtnl: Socket, found: Found, pool: IPv4Network, entries: Mapping[DomainUUID, EdgeIntent], known: Known
    ) -> tuple[str, ...]:
        """
        Have it in force wherever it can be, with these VMs and no others.

        What speaks against it, or the kernel's refusal, is in :attr:`states`; nftables does everything there.

        :param found: What :meth:`look` has found.
        :return: What others had changed, one line each.
        :raise KernelError: When a program cannot be removed although it must be.
        """
        reasons = dict(found.reasons)
        usable = [found.links[name] for name, reason in reasons.items() if not reason]
        missing: tuple[str, ...] = ()
        try:
            if usable and self._settings is not None:
                missing = self._run(rtnl, usable, self._settings, pool, entries, known)
        except (KernelError, NoObject, ValueError) as error:
            usable, reasons = [], dict.fromkeys(reasons, str(error))
        self._attached.remove_from_rest(rtnl, {link.number for link in usable})
        if not usable:
            self.close()
        self.states = tuple(FastPathAt(name, reason) for name, reason in reasons.items())
        return missing

    @contextlib.contextmanager
    def changed(self, before: Iterable[EdgeIntent], after: Iterable[EdgeIntent]) -> Iterator[None]:
        """Change some VMs, and change them back when the block raises a :class:`KernelError`."""
        before, after = tuple(before), tuple(after)
        if self._running is not None:
            self._running.change(before, after)
        try:
            yield
        except KernelError:
            if self._running is not None:
                self._running.change(after, before)
            raise

    def replace(self, entries: Mapping[DomainUUID, EdgeIntent]) -> None:
        """Have these VMs and no others in the tables, if there are any; a VM that does not fit is left out."""
        if self._running is not None:
            self._running.replace(entries)

    def note_hosts(self, known: Known) -> None:
        """Take packets of these hosts' VMs from these hardware addresses."""
        if self._running is not None:
            self._running.note_hosts(known)

    @property
    def packets(self) -> int:
        """How many packets the present program has done."""
        return self._running.loaded.total("passed") if self._running is not None else 0

    def withdraw(self, rtnl: Socket) -> None:
        """
        Remove the program from all interfaces; nftables does everything.

        :raise KernelError: When the kernel refuses.
        """
        self._attached.remove(rtnl)
        self.close()

    def close(self) -> None:
        """Let go of the tables; the kernel keeps what it runs."""
        self._attached.close()
        if self._running is not None:
            self._running.close()
        self._running = None

    def _run(
        self,
        rtnl: Socket,
        links: Collection[Link],
        settings: EdgeSettings,
        pool: IPv4Network,
        entries: Mapping[DomainUUID, EdgeIntent],
        known: Known,
    ) -> tuple[str, ...]:
        place = _place(settings, links)
        former = running = self._running
        found: list[str] = []
        if running is None or not running.suits(place, pool, entries.values()):
            running = _Running(place, Tables.of(pool, entries.values()), entries, known)
        else:
            running.replace(entries)
            running.note_hosts(known)
            if running.restore():
                found.append("tables of the fast path were changed")
        self._running = running
        try:
            missing = self._attached.put(rtnl, links, running.loaded, ahead=running.loaded)
        finally:
            if former is not None and former is not running:
                former.close()
        if running is former:
            found += [f"the fast path at {name} was missing" for name in missing]
        return tuple(found)


class _Place(NamedTuple):
    """What the program takes as constant."""

    uplinks: tuple[int, ...]
    underlay: tuple[int, ...]
    checks_senders: bool
    lookup_flags: int


def _place(settings: EdgeSettings, links: Collection[Link]) -> _Place:
    uplinks, underlay = (
        tuple(sorted(link.number for link in links if link.name in names))
        for names in (settings.uplinks, settings.underlay)
    )
    return _Place(uplinks, underlay, settings.check_senders is SenderCheck.MAC, lookup_flags())


def _reasons(
    settings: EdgeSettings, names: Iterable[str], links: Mapping[str, Link], rtnl: Socket, nft: Socket
) -> dict[str, str]:
    """
    Return why the program must not be at an interface, by name; an empty string: it may.

    :raise KernelError: When something cannot be read.
    """
    against = _against(settings) or next(passed_by.on_machine(nft, rtnl), "")
    reasons = {name: against or passed_by.at_interface(rtnl, links.get(name)) for name in names}
    usable = {name for name, reason in reasons.items() if not reason}
    if usable and not (usable & settings.uplinks and usable & settings.underlay):
        reasons |= dict.fromkeys(usable, "no interface on the other side can have it")
    return reasons


def _against(settings: EdgeSettings) -> str:
    """Return what in the settings speaks against the program; an empty string: nothing."""
    if settings.fast_path is FastPathUse.OFF:
        return "fast_path is off under [edge] in natd.toml"
    if settings.check_senders is SenderCheck.INTERFACE:
        return "check_senders is interface under [edge] in natd.toml, which a program does not check"
    if max(len(settings.uplinks), len(settings.underlay)) > MOST_INTERFACES:
        return f"there are more than {MOST_INTERFACES} uplinks, or interfaces to hosts"
    return ""


class _Running:
    """
    One program with its tables.

    :raise NoObject, ValueError, KernelError: As :class:`~natctl.bpf.loading.Loaded`.
    """

    def __init__(self, place: _Place, tables: Tables, entries: Mapping[DomainUUID, EdgeIntent], known: Known) -> None:
        self._place, self._tables = place, tables
        self.loaded = Loaded(PROGRAM, tables.settings(**place._asdict()), tables.entries)
        self._hosts: dict[int, int] = {}
        """Numbers of the hosts, 1 and up."""
        self._known: dict[IPv4Address, frozenset[bytes]] = {}
        self._held = dict(entries)
        try:
            for slot, address in tables.addresses:
                self.loaded.put("slots", address, slot)
                self.loaded.put("addresses", slot, address)
            self._number(entries.values())
            images = tables.images(entries.values(), self._hosts)
            self._memory = {name: self.loaded.memory(name) for name in images}
            for name, image in images.items():
                self._memory[name].fill(image)
            self.note_hosts(known)
        except BaseException:
            self.loaded.close()
            raise

    def close(self) -> None:
        for memory in self._memory.values():
            memory.close()
        self.loaded.close()

    def suits(self, place: _Place, pool: IPv4Network, entries: Iterable[EdgeIntent]) -> bool:
        return (self._place, self._tables.pool) == (place, pool) and self._tables.suit(entries)

    def change(self, before: Iterable[EdgeIntent], after: Collection[EdgeIntent]) -> None:
        """Change some VMs; one that does not fit is left out."""
        after = [entry for entry in after if self._tables.suit((entry,))]
        before = [held for entry in before if (held := self._held.get(entry.domain)) is not None]
        self._number(after)
        for store in self._tables.change(before, after, self._hosts):
            self._memory[store.table].write(store.offset, store.data)
        for entry in before:
            self._held.pop(entry.domain, None)
        self._held.update((entry.domain, entry) for entry in after)

    def replace(self, entries: Mapping[DomainUUID, EdgeIntent]) -> None:
        held = self._held
        before = [entry for domain, entry in held.items() if entries.get(domain) != entry]
        after = [entry for domain, entry in entries.items() if held.get(domain) != entry]
        self.change(before, after)

    def note_hosts(self, known: Known) -> None:
        self._number_hosts(map(int, known))
        for via, addresses in known.items():
            if (number := self._hosts.get(int(via), 0)) and self._known.get(via) != addresses:
                self._known[via] = addresses
                store = owner_tables.host_store(number, addresses)
                self._memory[store.table].write(store.offset, store.data)

    def restore(self) -> bool:
        """Write again what somebody else changed. :return: Whether anything was."""
        changed = [memory.restore() for memory in self._memory.values()]
        return any(changed)

    def _number(self, entries: Iterable[EdgeIntent]) -> None:
        self._number_hosts({int(entry.via) for entry in entries if entry.via is not None})

    def _number_hosts(self, hosts: Iterable[int]) -> None:
        for via in hosts:
            if via not in self._hosts and len(self._hosts) + 1 < MOST_HOSTS:
                self._hosts[via] = len(self._hosts) + 1
