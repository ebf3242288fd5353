"""
Asks the kernel whether VMs' packets, and the answers, go the way that was programmed (:mod:`natctl.ruleset.way_check`).

Tested by ``tests/netns/test_ways.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from cpm.protocol.errors import KernelError
from cpm.protocol.model import DomainUUID
from natctl.kernel import sysctl
from natctl.kernel.settings_before import SettingsBefore
from natctl.kernel.unrouted_taps import UnroutedTaps
from natctl.model.entries import HostEntry, HostSettings, Path
from natctl.netlink import routes
from natctl.netlink.links import Link, read_links
from natctl.netlink.networks import interface_addresses
from natctl.netlink.socket import Socket
from natctl.ruleset import way_check
from natctl.ruleset.marks import Marks
from natctl.ruleset.way_check import INTERNET, Answer, Bridge, Question

ASKED_AT_ONCE = 500
"""VMs of a bridge that are asked for in one check; with more, the next check goes on with the others."""


class Ways:
    """
    The last check of all bridges that have VMs.

    :param noted: Where it is kept what kernel settings were before they were changed.
    """

    def __init__(self, noted: SettingsBefore) -> None:
        self._noted = noted
        self.warnings: tuple[str, ...] = ()
        """What is wrong, a sentence each, with the remedy."""
        self.problems: Mapping[DomainUUID, str] = {}
        """What is wrong with the packets of a VM: completes the sentence "its packets …"."""
        self.bridges: frozenset[str] = frozenset()
        """The bridges with VMs behind them."""
        self._turn = 0
        self.is_direct = False
        """Whether packets get to the edges by a program at the uplinks, without a routing rule."""
        self._unrouted = UnroutedTaps()

    def check(
        self, rtnl: Socket, settings: HostSettings, path: Path, entries: Collection[HostEntry]
    ) -> tuple[str, ...]:
        """
        Ask, and loosen reverse path filters that the answers show to be in the way. Have nothing routed from VMs' taps.

        Never fails: what was programmed is in force, whatever the check finds.

        :return: What was changed, a line each.
        """
        try:
            return self._check(rtnl, settings, path, entries)
        except KernelError as error:
            self.warnings = (f"cannot check the way of VMs' packets: {error}",)
            return ()

    def _check(
        self, rtnl: Socket, settings: HostSettings, path: Path, entries: Collection[HostEntry]
    ) -> tuple[str, ...]:
        is_concerned = bool(entries) and not any(INTERNET in network for network in settings.exempt)
        taps = {tap for entry in entries for tap in entry.taps} if is_concerned else set()
        links = read_links(rtnl) if is_concerned or self._unrouted else {}
        self._unrouted.update(rtnl, links, taps)
        if not is_concerned:
            self.warnings = ()
            self.problems, self.bridges = {}, frozenset()
            return ()
        # What comes to an uplink gets to an edge from there.
        path = dataclasses.replace(path, edges=frozenset()) if self.is_direct else path
        check = _Check(rtnl, settings, path, {index: link.name for index, link in links.items()}, self._noted)
        check.note_unbridged(links, entries)
        for bridge, vms in bridges(rtnl, links, entries):
            check.answers |= {vm.intent.domain: self.problems.get(vm.intent.domain, "") for vm in vms}
            check.run(bridge, self._some(vms))
        self._turn += 1
        self.bridges = frozenset(check.counts)
        self.problems = {domain: problem for domain, problem in check.answers.items() if problem}
        self.warnings = (*way_check.sentences(check.problems, check.counts), *check.unbridged)
        return tuple(check.changed)

    def _some(self, vms: Sequence[HostEntry]) -> Sequence[HostEntry]:
        parts = -(-len(vms) // ASKED_AT_ONCE)
        start = self._turn % parts * ASKED_AT_ONCE
        return vms[start : start + ASKED_AT_ONCE]


class _Check:
    def __init__(
        self, rtnl: Socket, settings: HostSettings, path: Path, names: dict[int, str], noted: SettingsBefore
    ) -> None:
        self._noted = noted
        self._rtnl = rtnl
        self._settings = settings
        self._path = path
        self._names = names
        self._marks = Marks.of_mask(settings.mark_mask)
        self.problems: list[tuple[str, str, str]] = []
        self.counts: dict[str, int] = {}
        self.answers: dict[DomainUUID, str] = {}
        """The problem of each VM, now or when it was asked for last; an empty string: none."""
        self.unbridged: list[str] = []
        """A sentence for each VM whose interfaces are on no bridge."""
        self.changed: list[str] = []
        self._hopeless: set[str] = set()
        """Interfaces whose own filter does not decide; tried once in a check."""

    def note_unbridged(self, links: Mapping[int, Link], entries: Collection[HostEntry]) -> None:
        """Note VMs that were taken out of their bridge: they keep their ports, and nobody knows their packets."""
        for entry in entries:
            taps = [links[tap] for tap in sorted(entry.taps) if tap in links]
            if taps and not any(tap.is_bridge_port for tap in taps):
                problem = way_check.unbridged_problem([tap.name for tap in taps])
                self.answers[entry.intent.domain] = problem
                self.unbridged.append(f"packets of VM {entry.intent.name} {problem}")

    def run(self, bridge: Bridge, vms: Sequence[HostEntry]) -> None:
        self.counts[bridge.name] = len(vms)
        back: dict[int, str] = {}
        for entry in vms:
            answer = self._ask(way_check.outwards(bridge, self._marks.of(entry.index)))
            problem = way_check.outward_problem(answer, bridge, self._settings, self._path, self._names)
            if not problem:
                if answer.interface not in back:
                    question = way_check.inwards(bridge, answer.interface)
                    back[answer.interface] = way_check.inward_problem(
                        self._ask(question), bridge, self._names, answer.interface
                    )
                problem = back[answer.interface]
            self.answers[entry.intent.domain] = problem
            if problem:
                self.problems.append((bridge.name, entry.intent.name, problem))

    def _ask(self, question: Question) -> Answer:
        answer = routes.ask(self._rtnl, question)
        interface = self._names.get(question.interface, "")
        if not answer.is_filtered or interface in self._hopeless:
            return answer
        if line := sysctl.loosen_until(
            interface, lambda: not routes.ask(self._rtnl, question).is_filtered, self._noted
        ):
            self.changed.append(line)
            return routes.ask(self._rtnl, question)
        self._hopeless.add(interface)
        return answer


def bridges(
    rtnl: Socket, links: dict[int, Link], entries: Collection[HostEntry]
) -> Iterator[tuple[Bridge, list[HostEntry]]]:
    """Yield the bridges with VMs behind them that are routed, and these VMs. :raise KernelError: When it fails."""
    by_bridge: dict[int, list[HostEntry]] = {}
    for entry in sorted(entries, key=lambda each: each.index):
        # A tap may be in a VRF or in Open vSwitch, which have masters too: nobody knows their packets.
        for index in {links[tap].master for tap in entry.taps if tap in links and links[tap].is_bridge_port} - {None}:
            assert index is not None
            by_bridge.setdefault(index, []).append(entry)
    addresses = interface_addresses(rtnl)
    for index, vms in by_bridge.items():
        guest = way_check.guest_address(addresses.get(index, ()))
        if index in links and guest is not None:
            yield Bridge(links[index].name, index, guest), vms
