"""
cpmd's metrics in Prometheus' text format, computed from the manager for each request.

They are made in small pieces, so that who sends them can let the manager work in between: what is in one piece is of
one moment, the whole is not. :mod:`cpm.service.metrics.cpmd` declares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address
from itertools import islice
from typing import Final, TypeAlias, TypeVar

from cpm.api import handlers, operations
from cpm.api.views import Document, NodeView
from cpm.core.manager import Manager
from cpm.core.sizing.observation import reason_word
from cpm.protocol.model import VM, AllocationState, Role
from cpm.queries import nodes, pool, vms
from cpm.queries.status import About
from cpm.service.metrics import cpmd as declared
from cpm.service.metrics.values import CONTENT_TYPE, Metric, label_value

PIECE: Final = 100
"""VMs of which one piece is made: about a millisecond."""

_T = TypeVar("_T")
Named: TypeAlias = list[tuple[VM, str]]
"""VMs, each with its labels in braces."""

_ACTIVE, _RESERVED = AllocationState.ACTIVE, AllocationState.RESERVED


@handlers.query(operations.METRICS)
def exposition(manager: Manager, now: float, about: About | None = None) -> Document:
    """Return all metrics in the text format."""
    return Document(CONTENT_TYPE, pieces(manager, now, about))


def pieces(manager: Manager, now: float, about: About | None = None) -> Iterator[str]:
    """
    Yield the text in pieces, some of them empty.

    :param now: Ledger time.
    :param about: Says whether there are metrics of single VMs; None: there are.
    """
    if about is not None:
        yield declared.BUILD.text([((about.version,), 1)])
    per_vm = about is None or about.per_vm_metrics
    yield "".join(_site(manager))
    yield from _vms(manager, per_vm=per_vm)
    yield from _addresses(manager)
    yield from _nodes(manager, now)
    yield from _membership(manager)


def _site(manager: Manager) -> Iterator[str]:
    fleet, tallies = manager.fleet, manager.fleet.tallies
    yield declared.EPOCH.one(manager.epoch)
    yield declared.WRITABLE.one(fleet.unwritable is None)
    yield declared.WRITE_FAILURES.one(tallies.write_failures)
    yield declared.RESTORING.one(manager.restoring is not None)
    yield declared.REFUSED_DECISIONS.one(fleet.refusals.count)
    yield declared.CLOCK_STEPS.one(sum(step.is_set for step in fleet.timeline.steps))
    lacking = {"start": len(manager.waiting), "growth": sum(each.waiting_to_grow for each in manager.sizer.contentions)}
    yield _by_word(declared.LACKING, lacking)
    ongoing = manager.sizer.notices.ongoing()
    yield declared.SHORT.text(((event.value,), count) for event, count in ongoing.items())
    yield _by_word(declared.RESIZES, tallies.resizes)
    yield _by_word(declared.REFUSALS, tallies.refusals)
    yield declared.RESIZE_SECONDS.histograms(tallies.resize_s)


def _by_word(metric: Metric, counts: dict[str, int]) -> str:
    return metric.text(((word,), count) for word, count in sorted(counts.items()))


def _chunks(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk


# VMs


def _vms(manager: Manager, *, per_vm: bool) -> Iterator[str]:
    """Yield an empty piece for each :data:`PIECE` VMs; then the metrics, of which each has to be in one place."""
    states = Counter(("not managed",) for session in manager.sessions.values() for _ in session.unmanaged)
    short_of: Counter[tuple[str]] = Counter()
    table = _Table(manager)
    for chunk in _chunks(list(manager.fleet.vms.values()), PIECE):
        states.update((vms.state(manager, vm),) for vm in chunk)
        observed = (manager.sizer.observed.get(vm.uuid) for vm in chunk)
        refusals = (each.refusal for each in observed if each is not None)
        short_of.update((reason_word(refusal),) for refusal in refusals if refusal is not None)
        if per_vm:
            table.add(chunk)
        yield ""
    yield declared.DOMAINS.text(sorted(states.items()))
    yield declared.SHORT_OF.text(sorted(short_of.items()))
    if per_vm:
        yield from table.pieces()


class _Table:
    """
    The metrics of single VMs.

    Lines are formatted at once, and joined per piece: a hundred thousand numbers that are kept for the end would have
    to be walked by Python's garbage collector. This is most of the work of a scrape, hence its plain loops.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._texts: dict[str, list[str]] = {metric.name: [] for metric in declared.PER_VM}
        self._addresses: dict[IPv4Address, str] = {}

    def add(self, chunk: Iterable[VM]) -> None:
        """Add VMs."""
        named = [(vm, _labels(vm)) for vm in chunk]
        self._add_ranges(named)
        self._add_limits(named)
        self._add_counts(named)

    def pieces(self) -> Iterator[str]:
        """Yield the text of all metrics."""
        for metric in declared.PER_VM:
            yield metric.head
            yield from self._texts[metric.name]

    def _put(self, metric: Metric, lines: list[str]) -> None:
        if lines:
            self._texts[metric.name].append("".join(lines))

    def _add_ranges(self, named: Named) -> None:
        infos: list[str] = []
        helds: list[str] = []
        leavings: list[str] = []
        ranges: list[str] = []
        useds: list[str] = []
        of, observed = self._manager.fleet.of, self._manager.sizer.observed
        for vm, labels in named:
            held = leaving = 0
            current = None
            for each in of(vm.uuid):
                size = each.ports.size
                held += size
                if each.state is _ACTIVE or (each.state is _RESERVED and current is None):
                    current = each
                elif each.state is not _RESERVED:
                    leaving += size
            address = self._address(current.external) if current is not None else ""
            infos.append(f'virt_ports_domain_info{labels[:-1]},node="{label_value(vm.node)}",address="{address}"}} 1\n')
            helds.append(f"virt_ports_domain_held_ports{labels} {held}\n")
            leavings.append(f"virt_ports_domain_leaving_ports{labels} {leaving}\n")
            if current is None:
                continue
            ranges.append(f"virt_ports_domain_range_ports{labels} {current.ports.size}\n")
            observation = observed.get(vm.uuid)
            if observation is None or observation.counted != current.id or observation.measured is None:
                continue
            if (used := observation.measured.ports_in_use) is not None:
                useds.append(f"virt_ports_domain_used_ports{labels} {used}\n")
        self._put(declared.VM_INFO, infos)
        self._put(declared.VM_HELD, helds)
        self._put(declared.VM_LEAVING, leavings)
        self._put(declared.VM_RANGE, ranges)
        self._put(declared.VM_USED, useds)

    def _add_limits(self, named: Named) -> None:
        floors: list[str] = []
        caps: list[str] = []
        connections: list[str] = []
        for vm, labels in named:
            wishes = self._manager.wishes(vm)
            floors.append(f"virt_ports_domain_floor_ports{labels} {wishes.floor.value}\n")
            caps.append(f"virt_ports_domain_cap_ports{labels} {wishes.cap.value}\n")
            connections.append(f"virt_ports_domain_connections_limit{labels} {wishes.connections.value}\n")
        self._put(declared.VM_FLOOR, floors)
        self._put(declared.VM_CAP, caps)
        self._put(declared.VM_CONNECTIONS, connections)

    def _add_counts(self, named: Named) -> None:
        resizes: list[str] = []
        refusals: list[str] = []
        refused: list[str] = []
        limited: list[str] = []
        tallies, observed = self._manager.fleet.tallies.of_vm, self._manager.sizer.observed
        for vm, labels in named:
            if (tally := tallies.get(vm.uuid)) is not None:
                resizes += (
                    f'virt_ports_domain_resizes_total{labels[:-1]},kind="{kind}"}} {count}\n'
                    for kind, count in tally.resizes.items()
                )
                refusals += (
                    f'virt_ports_domain_refusals_total{labels[:-1]},reason="{reason}"}} {count}\n'
                    for reason, count in tally.refusals.items()
                )
            if (seen := observed.get(vm.uuid)) is None:
                continue
            if seen.refused_packets:
                refused.append(f"virt_ports_domain_refused_packets_total{labels} {seen.refused_packets}\n")
            if seen.limited_packets:
                limited.append(f"virt_ports_domain_limited_packets_total{labels} {seen.limited_packets}\n")
        self._put(declared.VM_RESIZES, resizes)
        self._put(declared.VM_REFUSALS, refusals)
        self._put(declared.VM_REFUSED_PACKETS, refused)
        self._put(declared.VM_LIMITED_PACKETS, limited)

    def _address(self, address: IPv4Address) -> str:
        if (text := self._addresses.get(address)) is None:
            text = self._addresses[address] = str(address)
        return text


def _labels(vm: VM) -> str:
    return f'{{name="{label_value(vm.name)}",uuid="{label_value(vm.uuid)}"}}'


# External addresses


def _addresses(manager: Manager) -> Iterator[str]:
    ports, longest, domains, own = [], [], [], []
    for known in sorted(manager.fleet.space.addresses, key=lambda each: int(each.address)):
        if manager.fleet.space.has_address(known.address):
            view = pool.address_view(manager, known)
            address = str(view.address)
            ports.append(((address, "allocated"), view.ports_allocated))
            ports.append(((address, "leaving"), view.ports_leaving))
            ports.append(((address, "free"), view.ports_total - view.ports_allocated - view.ports_leaving))
            longest.append(((address,), view.longest_free))
            domains.append(((address,), view.domains))
            own.append(((address,), view.ports_own))
        yield ""
    yield declared.PORTS.text(ports)
    yield declared.LONGEST_FREE.text(longest)
    yield declared.ADDRESS_DOMAINS.text(domains)
    yield declared.OWN.text(own)


# Nodes


def _nodes(manager: Manager, now: float) -> Iterator[str]:
    views = [view for view in nodes.node_views(manager, now) if view.is_known]
    yield ""

    def each(metric: Metric, value: Callable[[NodeView], float | None]) -> str:
        return metric.text(((view.name,), found) for view in views if (found := value(view)) is not None)

    def behind(view: NodeView) -> float:
        since = manager.edge_service.behind_since(view.name)
        return now - since if since is not None else 0

    def report_age(view: NodeView) -> float | None:
        session = manager.sessions.get(view.name)
        return now - session.reported_at if session is not None and session.reported_at is not None else None

    def refused(view: NodeView) -> int | None:
        session = manager.sessions.get(view.name)
        return len(session.refused) if session is not None else None

    yield each(declared.CONNECTED, lambda view: int(view.connected))
    yield each(declared.SYNCED, lambda view: int(view.synced))
    yield each(declared.IN_SERVICE, lambda view: int(view.in_service) if Role.EDGE in view.roles else None)
    yield each(declared.FENCED, lambda view: int(view.fenced))
    yield each(declared.BEHIND, behind)
    yield each(declared.REPORT_AGE, report_age)
    yield each(declared.HELD_BACK, lambda view: view.held_ports)
    yield each(declared.NODE_REFUSES, refused)
    yield each(declared.WARNINGS, lambda view: len(view.warnings))
    yield declared.DROPPED.text(
        ((view.name, reason), count) for view in views for reason, count in view.dropped.items()
    )


def _membership(manager: Manager) -> Iterator[str]:
    membership, fleet = manager.membership, manager.fleet
    yield declared.ASKING.one(len(membership.asked))
    yield _by_word(declared.SESSIONS_REFUSED, membership.refused)
    hosts = [(name, node) for name, node in sorted(fleet.nodes.items()) if Role.HOST in node.roles]
    use = [
        ((name, of), each(name))
        for name, _ in hosts
        for of, each in (("vms", fleet.use.vms), ("ports", fleet.use.ports))
    ]
    yield declared.USE.text(use)
    quotas = [(name, manager.quota(node)) for name, node in hosts]
    yield declared.QUOTA.text(
        ((name, of), most) for name, quota in quotas for of, most in (("vms", quota.vms), ("ports", quota.ports))
    )
