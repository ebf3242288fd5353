from __future__ import annotations

import random
from ipaddress import IPv4Address

import pytest

from bench import resize
from bench.site import externals
from cpm.core import moves
from cpm.core.fleet import Fleet
from cpm.core.journal import LedgerState
from cpm.core.sizing.resizing import Situation, choose, choose_first
from cpm.protocol.model import VM, AllocationId, AllocationState, DomainUUID, ExternalAddress, NodeName
from cpm.settings import Settings


@pytest.mark.parametrize("seed", range(8))
def test_the_pool_has_room_for_every_resize_in_any_order_though_all_that_was_left_drains(seed: int) -> None:
    rules = Settings().rules()
    addresses = tuple(ExternalAddress(IPv4Address(address)) for address in externals())
    fleet = Fleet(LedgerState(0, (), (), addresses, (), AllocationId(1)), rules.block)
    vms = [VM(DomainUUID(f"vm{n}"), f"g{n}", NodeName("host1"), IPv4Address(n + 1)) for n in range(resize.VMS)]
    for vm in vms:
        placement = choose_first(fleet.space, vm, rules.initial, rules.initial, strict=False)
        moves.activate(fleet, moves.reserve(fleet, vm.uuid, vm.node, placement, 0.0), 0.0)
    random.Random(seed).shuffle(vms)
    for number in range(resize.WARM_UP + resize.RESIZES):
        vm = vms[number % len(vms)]
        active = fleet.one(vm.uuid, AllocationState.ACTIVE)
        assert active is not None
        size = active.ports.size + rules.block
        moves.record(fleet, active, choose(Situation(space=fleet.space, active=active, target=size, allowed=size)), 0.0)
        reserved = fleet.one(vm.uuid, AllocationState.RESERVED)
        assert reserved is not None
        moves.activate(fleet, reserved, 0.0)
