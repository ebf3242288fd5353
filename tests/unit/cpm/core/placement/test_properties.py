"""No sequence of operations overloads a port or loses one."""

import dataclasses
import itertools
from ipaddress import IPv4Address

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cpm.core.placement import AddressSpace, Placement, place, place_larger, place_overflow, shrink
from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.errors import PortsExhausted
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    NodeName,
    PortRange,
    coalesce,
)

S = AllocationState
DOMAINS = [DomainUUID(name) for name in "abcdef"]
# Most of each address is reserved, so that the machine meets full addresses and odd boundaries all the time.
POOL = (
    ExternalAddress(IPv4Address("203.0.113.1"), (PortRange(0, 1023), PortRange(1500, 1500), PortRange(2600, 65535))),
    ExternalAddress(IPv4Address("203.0.113.2"), (PortRange(2048, 65500),)),
    ExternalAddress(IPv4Address("203.0.113.3"), (PortRange(1024, 30000), PortRange(31000, 65535))),
)


class Space(RuleBasedStateMachine):
    """Drives the space as a manager would and checks that its ports add up after every step."""

    sizes = st.integers(1, 900)
    domains = st.sampled_from(DOMAINS)

    @initialize(block=st.sampled_from([1, 16, 64, 100]))
    def start(self, block: int) -> None:
        self.space = AddressSpace(block)
        self.ids = 0
        for address in POOL:
            self.space.add_address(address)

    def _of(self, domain: DomainUUID, *states: S) -> list[Allocation]:
        return [each for each in self.space.of(domain) if each.state in states]

    def _take(self, domain: DomainUUID, external: IPv4Address, ports: PortRange, state: S) -> None:
        self.ids += 1
        new = Allocation(AllocationId(self.ids), domain, NodeName("host1"), external, ports, state, float(self.ids))
        if state is S.ACTIVE:
            # As the manager does: a new range begins as a reserved one, and so none of a machine's ports is in it.
            self.space.take(dataclasses.replace(new, state=S.RESERVED))
            self.space.change(new)
        else:
            self.space.take(new)

    def _change(self, old: Allocation, state: S, ports: PortRange | None = None) -> None:
        self.space.change(dataclasses.replace(old, state=state, ports=ports or old.ports))

    def _reclaim(self, placement: Placement) -> None:
        for each in placement.reclaimed:
            left = placement.left_of(each)
            self.space.release(each.id)
            for ports in left:
                self._take(each.domain, each.external, ports, each.state)

    def _promises(self, placement: Placement, wanted: int) -> None:
        assert placement.ports.size % self.space.block == 0
        assert placement.ports.size >= wanted
        assert (placement.ports.first - FIRST_PORT) % self.space.block == 0

    def _refusal_is_right(self, domain: DomainUUID, refusal: PortsExhausted, wanted: int) -> None:
        """A VM without allocations is refused only when no run is long enough."""
        if not self.space.of(domain):
            assert refusal.longest_free < wanted
        assert refusal.longest_free == self.space.longest_free()

    @rule(domain=domains, wanted=sizes)
    def start_vm(self, domain: DomainUUID, wanted: int) -> None:
        if self._of(domain, S.ACTIVE):
            return
        try:
            placement = place(self.space, domain, wanted)
        except PortsExhausted as refusal:
            self._refusal_is_right(domain, refusal, wanted)
            return
        self._promises(placement, wanted)
        self._reclaim(placement)
        self._take(domain, placement.external, placement.ports, S.ACTIVE)

    @rule(domain=domains, extra=sizes)
    def grow_vm(self, domain: DomainUUID, extra: int) -> None:
        for active in self._of(domain, S.ACTIVE):
            wanted = active.ports.size + extra
            try:
                placement = place_larger(self.space, active, wanted)
            except PortsExhausted as refusal:
                self._refusal_is_right(domain, refusal, wanted)
                return
            self._promises(placement, wanted)
            self._reclaim(placement)
            if placement.in_place:
                assert placement.ports.covers(active.ports)
                self._change(active, S.ACTIVE, placement.ports)
            else:
                self._change(active, S.DRAINING)
                self._take(domain, placement.external, placement.ports, S.ACTIVE)

    @rule(domain=domains, lacking=sizes, least_free=st.integers(0, 200), free=st.integers(0, 900))
    def overflow_vm(self, domain: DomainUUID, lacking: int, least_free: int, free: int) -> None:
        leaving = self._of(domain, S.DRAINING, S.HELD)
        for active in self._of(domain, S.ACTIVE):
            try:
                placement = place_overflow(self.space, active, lacking, least_free, {each.id: free for each in leaving})
            except PortsExhausted:
                return
            back = [each.ports for each in placement.reclaimed]
            assert placement.ports.size >= least_free or back == [placement.ports]
            assert back in ([], [placement.ports]), "a whole leaving range, or free ports"
            self._reclaim(placement)
            self._change(active, S.DRAINING)
            self._take(domain, placement.external, placement.ports, S.ACTIVE)

    @rule(domain=domains, wanted=sizes, upper=st.booleans())
    def shrink_vm(self, domain: DomainUUID, wanted: int, upper: bool) -> None:
        for active in self._of(domain, S.ACTIVE):
            result = shrink(active, wanted, self.space.block, upper=upper)
            if result.released is None:
                assert result.kept == active.ports
                return
            assert result.kept.join_with(result.released) == active.ports
            assert result.kept.size >= wanted
            assert (result.kept.last == active.ports.last) is upper
            self._change(active, S.ACTIVE, result.kept)
            self._take(domain, active.external, result.released, S.DRAINING)

    @rule(domain=domains)
    def stop_vm(self, domain: DomainUUID) -> None:
        for active in self._of(domain, S.ACTIVE):
            self._change(active, S.DRAINING)

    @rule(domain=domains)
    def hold(self, domain: DomainUUID) -> None:
        for draining in self._of(domain, S.DRAINING):
            self._change(draining, S.HELD)

    @rule(domain=domains)
    def free(self, domain: DomainUUID) -> None:
        for held in self._of(domain, S.HELD):
            self.space.release(held.id)

    @rule(address=st.sampled_from(POOL), first=st.integers(1000, 2700), size=st.integers(0, 300))
    def keep_own(self, address: ExternalAddress, first: int, size: int) -> None:
        self.space.keep_own(address.address, [PortRange(first, first + size - 1)] if size else [])

    @invariant()
    def every_port_is_free_taken_or_reserved(self) -> None:
        for address in POOL:
            taken = [each.ports for each in self.space.on(address.address)]
            free = list(self.space.free_runs(address.address))
            assert list(coalesce(free)) == free
            kept = coalesce((*address.reserved, *self.space.own_ports(address.address)))
            reserved = [rest for ports in kept for part in _within(ports) for rest in _without(part, taken)]
            parts = sorted(taken + free + reserved)
            assert parts[0].first == FIRST_PORT
            assert parts[-1].last == 65535
            assert all(left.last + 1 == right.first for left, right in itertools.pairwise(parts))
            usage = self.space.usage(address.address)
            assert usage.free + usage.taken + usage.reserved == 64512
            assert usage.reserved == sum(part.size for part in reserved)

    @invariant()
    def totals_are_the_sums_over_addresses(self) -> None:
        usages = [self.space.usage(address.address) for address in POOL]
        assert self.space.free_ports() == sum(usage.free for usage in usages)
        assert self.space.taken_ports() == sum(usage.taken for usage in usages)

    @invariant()
    def neighbours_are_found(self) -> None:
        for address in POOL:
            held = self.space.on(address.address)
            for left, right in itertools.pairwise([None, *held]):
                assert right is not None
                assert self.space.before(right) == left

    @invariant()
    def numbers_of_one_vm_are_disjoint(self) -> None:
        for domain in DOMAINS:
            ranges = sorted(each.ports for each in self.space.of(domain))
            assert all(left.last < right.first for left, right in itertools.pairwise(ranges))


def _without(ports: PortRange, taken: list[PortRange]) -> list[PortRange]:
    """Return the ports that are not taken: VMs keep ports that later became a machine's own."""
    rest = [ports]
    for held in taken:
        rest = [part for each in rest for part in each.minus(held)]
    return rest


def _within(ports: PortRange) -> list[PortRange]:
    return [PortRange(max(ports.first, FIRST_PORT), ports.last)] if ports.last >= FIRST_PORT else []


TestSpace = Space.TestCase
Space.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
